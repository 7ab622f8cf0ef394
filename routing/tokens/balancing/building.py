"""Builds a placement from nothing.

Replicas go to the experts with the most rows per replica, one by one. Then the experts are placed, those with the most
rows per replica first, each on the worker that would be done with it the soonest and that has room ("longest
processing time first").

Legend: L layers, E experts of a layer, W workers, S steps of a sequence, R replicas.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.slots import Slots


def build(slots: Slots, fleet: Fleet) -> None:
    """Fill empty `slots`. Rows are divided evenly among the replicas."""
    fill(slots, fleet, copies(slots.loads_LE, fleet, slots.slot_LER.shape[2]), by_slot=False)


def fill(slots: Slots, fleet: Fleet, copies_LE: np.ndarray, by_slot: bool) -> None:
    """Place `copies_LE` replicas of each expert, and divide its rows evenly."""
    piece_LE = slots.loads_LE / copies_LE
    order_LE = np.argsort(-piece_LE, axis=1, kind="stable")
    floor = fleet.floor
    if floor > 1:  # all of the floor first: there is room for it only if nothing else is in the way
        place_in_turn(slots, fleet, np.repeat(order_LE, floor, axis=1), copies_LE, floor, by_slot)
        place_in_turn(slots, fleet, in_turn(order_LE, copies_LE - floor), copies_LE, 0, by_slot)
    else:
        place_in_turn(slots, fleet, in_turn(order_LE, copies_LE), copies_LE, 0, by_slot)
    rows_LER = np.where(slots.slot_LER != slots.nowhere, slots.loads_LE[:, :, None], 0.0)
    np.put_along_axis(
        slots.rows_LP, slots.slot_LER.reshape(len(rows_LER), -1),
        (rows_LER / np.maximum(slots.copies_LE, 1)[:, :, None]).reshape(len(rows_LER), -1), axis=1,
    )  # fmt: skip
    slots.rows_LP[:, -1] = 0


def copies(loads_LE: np.ndarray, fleet: Fleet, most: int) -> np.ndarray:
    """Replicas of each expert that even out the rows per replica, `most` at most and all slots in all, int[L, E]."""
    (layers, experts), every_L = loads_LE.shape, np.arange(len(loads_LE))
    copies_LE = np.full((layers, experts), fleet.floor, dtype=np.int64)
    most = min(most, len(fleet.rows_per_s_W))
    spare_L = fleet.slots_LW.sum(axis=1) - experts * fleet.floor
    share_LE = loads_LE / copies_LE if fleet.floor < most else np.full(loads_LE.shape, -1.0)
    for given in range(max(0, int(spare_L.max()))):
        expert_L = share_LE.argmax(axis=1)
        layer_N = np.flatnonzero((given < spare_L) & (share_LE[every_L, expert_L] >= 0))
        expert_N = expert_L[layer_N]
        copies_LE[layer_N, expert_N] += 1
        copies_N = copies_LE[layer_N, expert_N]
        share_LE[layer_N, expert_N] = np.where(copies_N < most, loads_LE[layer_N, expert_N] / copies_N, -1.0)
    return copies_LE


def in_turn(order_LE: np.ndarray, times_LE: np.ndarray) -> np.ndarray:
    """Each expert as often as `times_LE` says, in the order given, int[L, S]; -1 at the end of shorter layers."""
    length = int(times_LE.sum(axis=1).max(initial=0))
    sequence_LS = np.full((len(order_LE), length), -1)
    for layer, order_E in enumerate(order_LE):
        line = np.repeat(order_E, times_LE[layer, order_E])
        sequence_LS[layer, : len(line)] = line
    return sequence_LS


def place_in_turn(
    slots: Slots, fleet: Fleet, sequence_LS: np.ndarray, copies_LE: np.ndarray, floor: int, by_slot: bool
) -> None:
    """Place the experts of `sequence_LS` one after the other, as if `copies_LE` replicas shared the rows of each.

    `floor` > 0: it names each expert `floor` times in a row, and they must be in different domains if there is a way;
    0: they should be where there is room. `by_slot`: an expert goes to the worker that lacks the most rows per free
    slot, not to the one that would be done the soonest, and slots to spare are left free on all workers alike.
    """
    every_L = slots.every_L
    piece_LE = slots.loads_LE / copies_LE
    free_LW = slots.slots_LW - slots.used_LW()
    load_LW = np.zeros(free_LW.shape)
    np.add.at(load_LW, *_placed(slots, piece_LE))
    share_LW = slots.loads_LE.sum(axis=1, keepdims=True) * fleet.rows_per_s_W / fleet.rows_per_s_W.sum()
    reserve_L1 = ((free_LW.sum(axis=1) - (sequence_LS >= 0).sum(axis=1)) // free_LW.shape[1])[:, None]
    several_S = (copies_LE[every_L[:, None], sequence_LS] > 1).any(axis=0)  # else an expert cannot meet itself
    for step in range(sequence_LS.shape[1]):
        expert_L = sequence_LS[:, step]
        named_L = expert_L >= 0
        may_LW = free_LW > 0
        if several_S[step]:
            held_LW = slots.held_LW(expert_L)
            may_LW &= ~held_LW
            may_LW = _narrow(may_LW, ~same_domain(held_LW, fleet.spread_WD))
            if floor:
                todo = sequence_LS.shape[1] // floor - step // floor
                may_LW = _narrow(may_LW, _leaves_room(free_LW, held_LW, fleet, todo, floor - step % floor))
            may_LW = _narrow(may_LW, ~same_domain(held_LW, fleet.host_WD))
        if by_slot:
            may_LW = _narrow(may_LW, free_LW > reserve_L1)
            late_LW = (load_LW - share_LW) / np.maximum(free_LW, 1)
        else:
            late_LW = (load_LW + piece_LE[every_L, expert_L][:, None]) / fleet.rows_per_s_W
        worker_L = np.where(may_LW, late_LW, np.inf).argmin(axis=1)
        layer_N = np.flatnonzero(named_L & may_LW.any(axis=1))
        expert_N, worker_N = expert_L[layer_N], worker_L[layer_N]
        taken_N = slots.slots_LW[layer_N, worker_N] - free_LW[layer_N, worker_N]
        slots.put(layer_N, expert_N, worker_N * slots.width + taken_N)
        free_LW[layer_N, worker_N] -= 1
        load_LW[layer_N, worker_N] += piece_LE[layer_N, expert_N]


def _placed(slots: Slots, piece_LE: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    layer_N, slot_N = np.nonzero(slots.expert_LP >= 0)
    return (layer_N, slot_N // slots.width), piece_LE[layer_N, slots.expert_LP[layer_N, slot_N]]


def apart(held_LW: np.ndarray, fleet: Fleet) -> np.ndarray:
    """Workers that a further replica may go to, bool[L, W]: in a domain that has none; where all have one, on a host
    that has none; where all have one, anywhere.
    """
    may_LW = _narrow(~held_LW, ~same_domain(held_LW, fleet.spread_WD))
    return _narrow(may_LW, ~same_domain(held_LW, fleet.host_WD))


def _narrow(may_LW: np.ndarray, better_LW: np.ndarray) -> np.ndarray:
    """Those that are better as well, in layers where there are any."""
    both_LW = may_LW & better_LW
    return np.where(both_LW.any(axis=1, keepdims=True), both_LW, may_LW)


def same_domain(held_LW: np.ndarray, one_of_WD: np.ndarray) -> np.ndarray:
    """Workers in a domain where the expert is held, bool[L, W]."""
    return (held_LW @ one_of_WD) @ one_of_WD.T > 0


def _leaves_room(free_LW: np.ndarray, held_LW: np.ndarray, fleet: Fleet, todo: int, replicas: int) -> np.ndarray:
    """Workers on which an expert's next replica leaves all others a way to be in different domains, bool[L, W].

    `todo` experts are left, this one included, with `replicas` of its own. A domain can serve each of them once, so
    one with at least `todo` free slots loses a chance for good when this expert passes it by, and any other does not.
    As many chances may be lost as there are more than needed.
    """
    held_LD = held_LW @ fleet.spread_WD
    free_LD = free_LW @ fleet.spread_WD + held_LD  # before this expert's first
    tall_LD = free_LD >= todo
    spare_L = np.minimum(free_LD, todo).sum(axis=1) - fleet.floor * todo
    lost_L = (tall_LD & (held_LD == 0)).sum(axis=1) - (replicas - 1)
    return (tall_LD @ fleet.spread_WD.T > 0) | (lost_L <= spare_L)[:, None]
