"""Builds a placement from nothing for workers that differ in speed or size.

There an even division among replicas misleads `building.build`: a fast worker with no more slots than a slow one must
get the experts with many rows, and a replica on a slow worker must get fewer of them.

Legend: L layers, N some of them, E experts of a layer, W workers, S slots of a worker, R replicas.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.building import fill, in_turn, place_in_turn
from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.slots import Slots

_LEVEL = 1e-3  # share of a worker's rows that is worth a replica


def build_by_shedding(slots: Slots, fleet: Fleet) -> None:
    """Fill empty `slots` with the floor alone. Then the slowest worker sheds rows to the one that lacks the most and
    has a free slot, again and again, but never more than either is away from its share by speed. Slots that are left
    get a further replica, without rows, of the experts with the most rows.
    """
    fill(slots, fleet, np.full(slots.copies_LE.shape, fleet.floor), by_slot=True)
    _shed(slots, fleet)
    if len(fleet.rows_per_s_W) > fleet.floor:
        least_LE = slots.copies_LE == fleet.floor
        order_LE = np.argsort(-slots.loads_LE, axis=1, kind="stable")
        sequence_LS = in_turn(order_LE, least_LE.astype(np.int64))
        place_in_turn(slots, fleet, sequence_LS, slots.copies_LE + least_LE, 0, by_slot=False)


def _shed(slots: Slots, fleet: Fleet) -> None:
    """Add replicas. In the layers `open_L` there was always something to win so far."""
    speed_W, most = fleet.rows_per_s_W, slots.slot_LER.shape[2]
    load_LW, free_LW = slots.load_LW(), slots.slots_LW - slots.used_LW()
    share_LW = load_LW.sum(axis=1, keepdims=True) * speed_W / speed_W.sum()
    open_L = slots.every_L
    for _ in range(int(free_LW.sum(axis=1).max())):
        over_NW = load_LW[open_L] - share_LW[open_L]
        from_N = (over_NW / speed_W).argmax(axis=1)
        to_N = np.where(free_LW[open_L] > 0, over_NW, np.inf).argmin(axis=1)
        every_N = np.arange(len(open_L))
        most_N = np.minimum(over_NW[every_N, from_N], -over_NW[every_N, to_N])
        slot_NS = from_N[:, None] * slots.width + np.arange(slots.width)
        expert_NS, rows_NS = slots.expert_LP[open_L[:, None], slot_NS], slots.rows_LP[open_L[:, None], slot_NS]
        own_NSR = slots.slot_LER[open_L[:, None], expert_NS]
        may_NS = (own_NSR // slots.width != to_N[:, None, None]).all(axis=2) & (expert_NS >= 0)
        may_NS &= slots.copies_LE[open_L[:, None], expert_NS] < most
        moved_NS = np.where(may_NS, np.minimum(rows_NS, most_N[:, None]), 0.0)
        at_N = moved_NS.argmax(axis=1)
        moved_N = moved_NS[every_N, at_N]
        goes_N = np.flatnonzero((moved_N > _LEVEL * share_LW[open_L, to_N]) & (free_LW[open_L, to_N] > 0))
        if not goes_N.size:
            return
        open_L, from_N, to_N = open_L[goes_N], from_N[goes_N], to_N[goes_N]
        at_N, moved_N = at_N[goes_N], moved_N[goes_N]
        new_N = to_N * slots.width + slots.slots_LW[open_L, to_N] - free_LW[open_L, to_N]
        slots.put(open_L, expert_NS[goes_N, at_N], new_N)
        free_LW[open_L, to_N] -= 1
        slots.rows_LP[open_L, slot_NS[goes_N, at_N]] -= moved_N
        slots.rows_LP[open_L, new_N] += moved_N
        load_LW[open_L, from_N] -= moved_N
        load_LW[open_L, to_N] += moved_N
