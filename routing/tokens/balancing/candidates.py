"""Which moves are worth a try.

Candidates are ranked by how much they would lower the sum over workers of rows^2 / speed if all but the workers
concerned stayed as they are; the best ones are then tried.

Legend: L layers, K candidates, E experts of a layer, W workers, P slots of a layer, S slots of a worker, R replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routing.tokens.balancing.building import apart
from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.slots import EMPTY, Slots

_TRIALS = 64  # of all layers together in a round, when few are left


@dataclass(frozen=True, eq=False)
class Candidates:
    """Load `expert_K` into `slot_K` of `worker_K`, whose replica goes if there is one."""

    layer_K: np.ndarray
    expert_K: np.ndarray
    worker_K: np.ndarray
    slot_K: np.ndarray


def trials(layers: int) -> int:
    """Return how many candidates of each layer to try in one round."""
    return max(1, _TRIALS // layers)


def best_of(layer_K: np.ndarray, gain_K: np.ndarray, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the greatest gain of each layer, -inf where it has none, and where it is, int[L]; the first of equals."""
    best_L, at_L = np.full(layers, -np.inf), np.zeros(layers, dtype=np.int64)
    order_K = np.lexsort((-np.arange(len(gain_K)), gain_K))
    best_L[layer_K[order_K]] = gain_K[order_K]  # the last of a layer is its best
    at_L[layer_K[order_K]] = order_K
    return best_L, at_L


def highest(value_LN: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return layer and column of the `count` highest finite values of each layer, from the highest on."""
    best = count == 1
    at_LC = value_LN.argmax(axis=1)[:, None] if best else np.argsort(-value_LN, axis=1, kind="stable")[:, :count]
    layer_N, column_N = np.nonzero(np.isfinite(np.take_along_axis(value_LN, at_LC, axis=1)))
    return layer_N, at_LC[layer_N, column_N]


def candidates(slots: Slots, fleet: Fleet, banned_LEW: np.ndarray, count: int) -> Candidates:
    """Return the `count` best ways, by layer, to load an expert of the slowest worker on another one as well."""
    every_L1, workers = slots.every_L[:, None], len(fleet.rows_per_s_W)
    speed_W, load_LW = fleet.rows_per_s_W, slots.load_LW()
    slowest_L = (load_LW / speed_W).argmax(axis=1)
    expert_LS = slots.by_worker(slots.expert_LP)[slots.every_L, slowest_L]
    rows_LS = slots.by_worker(slots.rows_LP)[slots.every_L, slowest_L]
    victim_LW, cost_LW = victims(slots, fleet)
    held_LSW = slots.held_LSW(expert_LS)
    may_LSW = np.isfinite(cost_LW)[:, None, :] & ~held_LSW & ~banned_LEW[every_L1, expert_LS]
    room_LS = (expert_LS != EMPTY) & (slots.copies_LE[every_L1, expert_LS] < slots.slot_LER.shape[2])
    may_LSW &= room_LS[:, :, None]

    # The replica that makes room hands its rows to its expert's fastest other holder.
    freed_LW = slots.rows_LP[every_L1, victim_LW]
    rest_LW = load_LW - freed_LW
    harm_LW = np.where(freed_LW > 0, _harm(slots, fleet, victim_LW, load_LW), 0.0)
    slow_load_L1, slow_speed_L1 = load_LW[slots.every_L, slowest_L][:, None], speed_W[slowest_L][:, None]
    level_LW = (slow_load_L1 * speed_W - rest_LW * slow_speed_L1) / (slow_speed_L1 + speed_W)
    moved_LSW = np.clip(level_LW[:, None, :], 0.0, rows_LS[:, :, None])
    relief_LSW = moved_LSW * (
        2 * (slow_load_L1 / slow_speed_L1 - rest_LW / speed_W)[:, None, :]
        - moved_LSW * (1 / slow_speed_L1 + 1 / speed_W)[:, None, :]
    )
    gain_LSW = relief_LSW - harm_LW[:, None, :]
    may_LSW &= gain_LSW > 0
    # Where an expert may be apart from its other replicas, that goes first.
    apart_LSW = apart(held_LSW.reshape(-1, workers), fleet).reshape(held_LSW.shape)
    apart_LSW &= (may_LSW & apart_LSW).any(axis=(1, 2), keepdims=True)
    gain_LSW = np.where(may_LSW & (apart_LSW | ~apart_LSW.any(axis=(1, 2), keepdims=True)), gain_LSW, -np.inf)
    layer_K, at_K = highest(gain_LSW.reshape(len(load_LW), -1), count)
    worker_K = at_K % workers
    return Candidates(layer_K, expert_LS[layer_K, at_K // workers], worker_K, victim_LW[layer_K, worker_K])


def victims(slots: Slots, fleet: Fleet) -> tuple[np.ndarray, np.ndarray]:
    """Return the slot of each worker that a new expert would take, int[L, W], and the seconds that its replica takes
    now: below 0 for a free slot, infinite where every replica is needed.
    """
    expert_LWS = slots.by_worker(slots.expert_LP)
    seconds_LWS = slots.by_worker(slots.rows_LP) / fleet.rows_per_s_W[:, None]
    cost_LWS = np.where(slots.by_worker(_redundant(slots, fleet)), seconds_LWS, np.inf)
    free_LW = slots.slots_LW > (expert_LWS != EMPTY).sum(axis=2)
    cost_LWS = np.where((expert_LWS == EMPTY) & free_LW[:, :, None], -1.0, cost_LWS)
    at_LW = cost_LWS.argmin(axis=2)
    cost_LW = np.take_along_axis(cost_LWS, at_LW[:, :, None], axis=2)[:, :, 0]
    return at_LW + np.arange(at_LW.shape[1]) * slots.width, cost_LW


def _redundant(slots: Slots, fleet: Fleet) -> np.ndarray:
    """Slots whose replica the floor does not need, bool[L, P]: the expert has more replicas than the floor, and
    without this one in no fewer domains, or in as many as the floor.
    """
    layer_K, expert_K = np.nonzero(slots.copies_LE > fleet.floor)
    slot_KR = slots.slot_LER[layer_K, expert_K]
    needless_KR = slot_KR != slots.nowhere
    if fleet.floor > 1:
        # Beyond the last replica every entry is a domain of its own.
        domain_W1 = np.append(fleet.spread_W, 0)
        domain_KR = np.where(needless_KR, domain_W1[slot_KR // slots.width], -1 - np.arange(slot_KR.shape[1]))
        alike_KR = (domain_KR[:, :, None] == domain_KR[:, None, :]).sum(axis=2)
        different_K1 = (needless_KR / alike_KR).sum(axis=1, keepdims=True).round()
        needless_KR &= (alike_KR > 1) | (different_K1 > fleet.floor)
    redundant_LP = np.zeros(slots.expert_LP.shape, dtype=bool)
    at_N, replica_N = np.nonzero(needless_KR)
    redundant_LP[layer_K[at_N], slot_KR[at_N, replica_N]] = True
    return redundant_LP


def _harm(slots: Slots, fleet: Fleet, victim_LW: np.ndarray, load_LW: np.ndarray) -> np.ndarray:
    """By how much the sum of rows^2 / speed rises when the rows of a victim go to the fastest other holder."""
    every_L1, speed_W = slots.every_L[:, None], fleet.rows_per_s_W
    slot_LWR = slots.slot_LER[every_L1, slots.expert_LP[every_L1, victim_LW]]
    other_LWR = (slot_LWR != slots.nowhere) & (slot_LWR != victim_LW[:, :, None])
    worker_LWR = np.where(other_LWR, slot_LWR // slots.width, 0)
    time_LWR = np.where(other_LWR, (load_LW / speed_W)[every_L1[:, :, None], worker_LWR], np.inf)
    at_LW1 = time_LWR.argmin(axis=2)[:, :, None]
    time_LW = np.where(other_LWR.any(axis=2), np.take_along_axis(time_LWR, at_LW1, axis=2)[:, :, 0], 0.0)
    heir_speed_LW = speed_W[np.take_along_axis(worker_LWR, at_LW1, axis=2)[:, :, 0]]
    freed_LW = slots.rows_LP[every_L1, victim_LW]
    taken_over_LW = freed_LW * (2 * time_LW + freed_LW / heir_speed_LW)
    return taken_over_LW - (load_LW**2 - (load_LW - freed_LW) ** 2) / speed_W
