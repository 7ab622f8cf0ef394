"""Exchanges experts between workers of a placement that nobody has loaded yet, so that no order of moves matters.

Legend: L layers, K candidates, W workers, P slots of a layer, S slots of a worker, R replicas.
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


def exchange(slots: Slots, fleet: Fleet, loss_weight: float, rounds: int, least_gain: float) -> None:
    """Relieve the slowest worker of each layer: a replica of its own against one of another worker, at most `rounds`
    times. `least_gain`: share of a layer's time that there must be to win for another try.
    """
    closed_L = np.zeros(len(slots.loads_LE), dtype=bool)
    for _ in range(rounds):
        open_L = np.flatnonzero(uneven_L(slots, fleet, least_gain) & ~closed_L)
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
    slowest_L = (load_LW / speed_W).argmax(axis=1)
    slot_LS = slowest_L[:, None] * slots.width + np.arange(slots.width)
    expert_LS, expert_LP = slots.expert_LP[every_L1, slot_LS], slots.expert_LP[:, :-1]
    worker_P = np.arange(expert_LP.shape[1]) // slots.width

    # Neither expert may meet another replica of its own, nor come into a domain of one where the floor keeps them apart.
    held_LSW = slots.held_LSW(expert_LS)
    met_LSW = held_LSW.copy()
    other_LPR = slots.slot_LER[every_L1, expert_LP] // slots.width
    met_LP = (other_LPR == slowest_L[:, None, None]).any(axis=2)
    if fleet.floor > 1:
        held_LSW[every_L, :, slowest_L] = False
        met_LSW |= same_domain(held_LSW, fleet.spread_WD)
        domain_W1 = np.append(fleet.spread_W, -1)
        of_slowest_L11 = fleet.spread_W[slowest_L][:, None, None]
        met_LP |= ((domain_W1[other_LPR] == of_slowest_L11) & (other_LPR != worker_P[:, None])).any(axis=2)
    may_LSP = ~met_LSW[:, :, worker_P] & ~met_LP[:, None, :]
    may_LSP &= (expert_LS != EMPTY)[:, :, None] & (expert_LP != EMPTY)[:, None, :]

    # Replicas that are not the only ones can leave a part of their rows with the others.
    moved_LSP = slots.rows_LP[every_L1, slot_LS][:, :, None] - slots.rows_LP[:, None, :-1]
    slow_L1, slow_speed_L1 = load_LW[every_L, slowest_L][:, None], speed_W[slowest_L][:, None]
    level_LW = (slow_L1 * speed_W - load_LW * slow_speed_L1) / (slow_speed_L1 + speed_W)
    several_LS, several_LP = slots.copies_LE[every_L1, expert_LS] > 1, slots.copies_LE[every_L1, expert_LP] > 1
    part_LSP = several_LS[:, :, None] | several_LP[:, None, :]
    moved_LSP = np.where(part_LSP, np.minimum(moved_LSP, level_LW[:, None, worker_P]), moved_LSP)
    gap_LW, slowness_LW = 2 * (slow_L1 / slow_speed_L1 - load_LW / speed_W), 1 / slow_speed_L1 + 1 / speed_W
    gain_LSP = moved_LSP * (gap_LW[:, None, worker_P] - moved_LSP * slowness_LW[:, None, worker_P])
    gain_LSP = np.where(may_LSP & (gain_LSP > 0), gain_LSP, -np.inf)
    layer_K, at_K = highest(gain_LSP.reshape(len(load_LW), -1), count)
    return layer_K, slot_LS[layer_K, at_K // len(worker_P)], at_K % len(worker_P)
