"""Exchanges experts between workers of a placement that nobody has loaded yet, so that no order of moves matters.

Legend: L layers, K candidates, W workers, V of them, S slots of a worker, Q slots of the V, R replicas.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.building import same_domain
from routing.tokens.balancing.candidates import best_of, highest, trials
from routing.tokens.balancing.division import divide
from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.loss import cost_L, times_L, uneven_L
from routing.tokens.balancing.slots import EMPTY, Slots

_DIVISIONS = 12  # rounds of division after an exchange
_PROGRESS = 1e-4  # share of a layer's time
_LAYERS = 8  # that are worked on at a time
_PARTNERS = 8  # the fastest workers of a layer, with which its slowest may exchange


def exchange(slots: Slots, fleet: Fleet, loss_weight: float, rounds: int, least_gain: float) -> None:
    """Relieve the slowest worker of each layer: a replica of its own against one of another worker, at most `rounds`
    times. `least_gain`: share of a layer's time that there must be to win for another try.
    """
    closed_L = np.zeros(len(slots.loads_LE), dtype=bool)
    for _ in range(rounds):
        open_L = np.flatnonzero(uneven_L(slots, fleet, least_gain) & ~closed_L)[:_LAYERS]
        if not open_L.size:
            return
        some = slots.of(open_L)
        layer_K, mine_K, theirs_K = _candidates(some, fleet, trials(len(open_L)))
        after = some.of(layer_K)
        after.swap(mine_K, theirs_K)
        divide(after, fleet.rows_per_s_W, _DIVISIONS)
        gain_K = cost_L(some, fleet, loss_weight)[layer_K] - cost_L(after, fleet, loss_weight)
        gain_N, at_N = best_of(layer_K, gain_K, len(open_L))
        good_N = gain_N > _PROGRESS * times_L(some, fleet)
        slots.take(open_L[good_N], after, at_N[good_N])
        closed_L[open_L[~good_N]] = True


def _candidates(slots: Slots, fleet: Fleet, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` best exchanges of each layer by the sum of rows^2 / speed: layers, slots of the slowest worker, and
    slots of others, int[K] each.
    """
    every_L, every_L1 = slots.every_L, slots.every_L[:, None]
    speed_W, load_LW = fleet.rows_per_s_W, slots.load_LW()
    time_LW = load_LW / speed_W
    slowest_L = time_LW.argmax(axis=1)
    slot_LS = slowest_L[:, None] * slots.width + np.arange(slots.width)
    partner_LV = np.argsort(time_LW, axis=1, kind="stable")[:, :_PARTNERS]
    other_LQ = (partner_LV[:, :, None] * slots.width + np.arange(slots.width)).reshape(len(load_LW), -1)
    expert_LS, expert_LQ = slots.expert_LP[every_L1, slot_LS], slots.expert_LP[every_L1, other_LQ]
    worker_LQ = other_LQ // slots.width

    # Neither may meet another replica of its expert, nor come into the domain of one where the floor keeps them apart.
    held_LSW = slots.held_LSW(expert_LS)
    met_LSW = held_LSW.copy()
    holder_LQR = slots.slot_LER[every_L1, expert_LQ] // slots.width
    met_LQ = (holder_LQR == slowest_L[:, None, None]).any(axis=2)
    if fleet.floor > 1:
        held_LSW[every_L, :, slowest_L] = False
        met_LSW |= same_domain(held_LSW, fleet.spread_WD)
        domain_W1 = np.append(fleet.spread_W, -1)
        of_slowest_L11 = fleet.spread_W[slowest_L][:, None, None]
        met_LQ |= ((domain_W1[holder_LQR] == of_slowest_L11) & (holder_LQR != worker_LQ[:, :, None])).any(axis=2)
    may_LSQ = ~met_LSW[every_L1[:, :, None], np.arange(slots.width)[:, None], worker_LQ[:, None, :]]
    may_LSQ &= ~met_LQ[:, None, :] & (expert_LS != EMPTY)[:, :, None] & (expert_LQ != EMPTY)[:, None, :]

    # Replicas that are not the only ones can leave a part of their rows with the others.
    moved_LSQ = slots.rows_LP[every_L1, slot_LS][:, :, None] - slots.rows_LP[every_L1, other_LQ][:, None, :]
    slow_L1, slow_speed_L1 = load_LW[every_L, slowest_L][:, None], speed_W[slowest_L][:, None]
    load_LQ, speed_LQ = load_LW[every_L1, worker_LQ], speed_W[worker_LQ]
    level_LQ = (slow_L1 * speed_LQ - load_LQ * slow_speed_L1) / (slow_speed_L1 + speed_LQ)
    several_LS, several_LQ = slots.copies_LE[every_L1, expert_LS] > 1, slots.copies_LE[every_L1, expert_LQ] > 1
    part_LSQ = several_LS[:, :, None] | several_LQ[:, None, :]
    moved_LSQ = np.where(part_LSQ, np.minimum(moved_LSQ, level_LQ[:, None, :]), moved_LSQ)
    gap_LQ, slowness_LQ = 2 * (slow_L1 / slow_speed_L1 - load_LQ / speed_LQ), 1 / slow_speed_L1 + 1 / speed_LQ
    gain_LSQ = moved_LSQ * (gap_LQ[:, None, :] - moved_LSQ * slowness_LQ[:, None, :])
    gain_LSQ = np.where(may_LSQ & (gain_LSQ > 0), gain_LSQ, -np.inf)
    layer_K, at_K = highest(gain_LSQ.reshape(len(load_LW), -1), count)
    others = other_LQ.shape[1]
    return layer_K, slot_LS[layer_K, at_K // others], other_LQ[layer_K, at_K % others]
