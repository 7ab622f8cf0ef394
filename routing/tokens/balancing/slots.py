"""Experts in slots: the state that placing and moving change, for many layers at once.

Legend: L layers, E experts of a layer, W workers, S slots of a worker, P = W * S slots of a layer and one more that
stands for nowhere, R the most replicas of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.records import Placement

EMPTY = -1


@dataclass(eq=False)
class Slots:
    """Slot s of worker w is number w * S + s. Not all S slots are a worker's: it may fill as many as `slots_LW` says.
    Methods change the arrays in place.
    """

    loads_LE: np.ndarray  # float64: rows of each expert
    slots_LW: np.ndarray  # int: how many slots each worker has, S at most
    expert_LP: np.ndarray  # int32: expert in each slot, EMPTY where there is none
    rows_LP: np.ndarray  # float64: rows that the slot's replica computes
    slot_LER: np.ndarray  # int32: slots of each expert, the first `copies_LE` of them; then nowhere
    copies_LE: np.ndarray  # int32
    width: int  # S

    @classmethod
    def empty(cls, loads_LE: np.ndarray, fleet: Fleet, most_copies: int) -> Slots:
        """No expert anywhere."""
        (layers, experts), workers = loads_LE.shape, fleet.slots_LW.shape[1]
        width = max(1, int(fleet.slots_LW.max()))
        nowhere = workers * width
        return cls(
            loads_LE.astype(np.float64), fleet.slots_LW, np.full((layers, nowhere + 1), EMPTY, dtype=np.int32),
            np.zeros((layers, nowhere + 1)), np.full((layers, experts, most_copies), nowhere, dtype=np.int32),
            np.zeros((layers, experts), dtype=np.int32), width,
        )  # fmt: skip

    @classmethod
    def holding(cls, placement: Placement, loads_LE: np.ndarray, fleet: Fleet, most_copies: int) -> Slots:
        """The experts of `placement`; rows as its weights divide them."""
        slots = cls.empty(loads_LE, fleet, most_copies)
        layer_N, expert_N, at_N = np.nonzero(placement.workers_LER >= 0)
        worker_N = placement.workers_LER[layer_N, expert_N, at_N].astype(np.int64)
        slot_N = worker_N * slots.width + _rank(layer_N * len(fleet.rows_per_s_W) + worker_N)
        slots.expert_LP[layer_N, slot_N] = expert_N
        slots.rows_LP[layer_N, slot_N] = loads_LE[layer_N, expert_N] * placement.weights_LER[layer_N, expert_N, at_N]
        slots.slot_LER[layer_N, expert_N, _rank(layer_N * loads_LE.shape[1] + expert_N)] = slot_N
        slots.copies_LE[:] = (placement.workers_LER >= 0).sum(axis=2)
        return slots

    @property
    def nowhere(self) -> int:
        """Number of the slot beyond the last."""
        return self.expert_LP.shape[1] - 1

    @property
    def every_L(self) -> np.ndarray:
        """Indices of the layers."""
        return np.arange(len(self.loads_LE))

    def by_worker(self, of_LP: np.ndarray) -> np.ndarray:
        """View `of_LP` as [L, W, S]."""
        return of_LP[:, :-1].reshape(len(of_LP), self.nowhere // self.width, self.width)

    def load_LW(self) -> np.ndarray:
        """Rows of each worker."""
        return self.by_worker(self.rows_LP).sum(axis=2)

    def used_LW(self) -> np.ndarray:
        """Slots of each worker that are taken."""
        return (self.by_worker(self.expert_LP) != EMPTY).sum(axis=2)

    def held_LW(self, expert_L: np.ndarray) -> np.ndarray:
        """Which workers hold the named expert of each layer, bool[L, W]."""
        layers, workers = self.slots_LW.shape
        held_LW = np.zeros((layers, workers + 1), dtype=bool)  # the last: nowhere
        held_LW[self.every_L[:, None], self.slot_LER[self.every_L, expert_L] // self.width] = True
        return held_LW[:, :-1]

    def held_LSW(self, expert_LS: np.ndarray) -> np.ndarray:
        """Which workers hold each of the experts named, bool[L, S, W]."""
        workers = self.slots_LW.shape[1]
        held_LSW = np.zeros((*expert_LS.shape, workers + 1), dtype=bool)  # the last: nowhere
        worker_LSR = self.slot_LER[self.every_L[:, None], expert_LS] // self.width
        np.put_along_axis(held_LSW, worker_LSR, True, axis=2)
        return held_LSW[:, :, :-1]

    def put(self, layer_N: np.ndarray, expert_N: np.ndarray, slot_N: np.ndarray) -> None:
        """Put one expert per named layer, or several different ones, into empty slots, with no rows yet; all rows if
        it was nowhere.
        """
        copies_N = self.copies_LE[layer_N, expert_N]
        self.expert_LP[layer_N, slot_N] = expert_N
        self.slot_LER[layer_N, expert_N, copies_N] = slot_N
        self.rows_LP[layer_N, slot_N] = np.where(copies_N == 0, self.loads_LE[layer_N, expert_N], 0)
        self.copies_LE[layer_N, expert_N] = copies_N + 1

    def clear(self, layer_N: np.ndarray, slot_N: np.ndarray) -> None:
        """Empty one slot of each named layer, whose expert has another replica. The first that is left gets the rows;
        `divide` moves them on.
        """
        expert_N = self.expert_LP[layer_N, slot_N]
        last_N = self.copies_LE[layer_N, expert_N] - 1
        own_NR = self.slot_LER[layer_N, expert_N]
        at_N = (own_NR == slot_N[:, None]).argmax(axis=1)
        every_N = np.arange(len(layer_N))
        own_NR[every_N, at_N] = own_NR[every_N, last_N]
        own_NR[every_N, last_N] = self.nowhere
        self.slot_LER[layer_N, expert_N] = own_NR
        self.copies_LE[layer_N, expert_N] = last_N
        self.rows_LP[layer_N, own_NR[:, 0]] += self.rows_LP[layer_N, slot_N]
        self.rows_LP[layer_N, slot_N] = 0
        self.expert_LP[layer_N, slot_N] = EMPTY

    def swap(self, one_L: np.ndarray, other_L: np.ndarray) -> None:
        """Exchange what is in two taken slots of each layer, rows and all."""
        every_L = self.every_L
        for slot_L, new_L in ((one_L, other_L), (other_L, one_L)):
            expert_L = self.expert_LP[every_L, slot_L]
            own_LR = self.slot_LER[every_L, expert_L]
            at_L = (own_LR == slot_L[:, None]).argmax(axis=1)
            self.slot_LER[every_L, expert_L, at_L] = new_L
        for of_LP in (self.expert_LP, self.rows_LP):
            of_LP[every_L, one_L], of_LP[every_L, other_L] = of_LP[every_L, other_L], of_LP[every_L, one_L]

    def of(self, layers: np.ndarray) -> Slots:
        """Copy some layers."""
        return Slots(
            self.loads_LE[layers], self.slots_LW[layers], self.expert_LP[layers], self.rows_LP[layers],
            self.slot_LER[layers], self.copies_LE[layers], self.width,
        )  # fmt: skip

    def view(self, layer: int) -> Slots:
        """One layer, without a copy."""
        one = slice(layer, layer + 1)
        return Slots(
            self.loads_LE[one], self.slots_LW[one], self.expert_LP[one], self.rows_LP[one], self.slot_LER[one],
            self.copies_LE[one], self.width,
        )  # fmt: skip

    def take(self, layers: np.ndarray, other: Slots, of_other: np.ndarray) -> None:
        """Replace `layers` with the layers `of_other` of `other`."""
        for mine, others in (
            (self.expert_LP, other.expert_LP), (self.rows_LP, other.rows_LP), (self.slot_LER, other.slot_LER),
            (self.copies_LE, other.copies_LE),
        ):  # fmt: skip
            mine[layers] = others[of_other]

    def placement(self) -> Placement:
        """Workers and weights of the experts."""
        rows_LER = self.rows_LP[self.every_L[:, None, None], self.slot_LER]
        held_LER = self.slot_LER != self.nowhere
        total_LE1 = rows_LER.sum(axis=2, keepdims=True)
        even_LER = held_LER / np.maximum(self.copies_LE, 1)[:, :, None]
        weights_LER = np.where(total_LE1 > 0, rows_LER / np.where(total_LE1 > 0, total_LE1, 1), even_LER)
        workers_LER = np.where(held_LER, self.slot_LER // self.width, -1)
        return Placement(workers_LER.astype(np.int16), weights_LER.astype(np.float32))


@dataclass(frozen=True, eq=False)
class SharedExperts:
    """The K experts of all layers that have several replicas, and those N replicas, expert by expert."""

    layer_K: np.ndarray
    first_K: np.ndarray  # number of its first replica
    copies_K: np.ndarray
    expert_N: np.ndarray  # number of the expert, 0 to K - 1
    slot_N: np.ndarray


def shared_experts(slots: Slots) -> SharedExperts:
    """List the experts that have several replicas."""
    layer_K, expert_K = np.nonzero(slots.copies_LE > 1)
    copies_K = slots.copies_LE[layer_K, expert_K]
    first_K = np.cumsum(copies_K) - copies_K
    expert_N = np.repeat(np.arange(len(copies_K)), copies_K)
    slot_N = slots.slot_LER[layer_K[expert_N], expert_K[expert_N], np.arange(len(expert_N)) - first_K[expert_N]]
    return SharedExperts(layer_K, first_K, copies_K, expert_N, slot_N)


def _rank(group_N: np.ndarray) -> np.ndarray:
    """How many of the same group come before each entry."""
    order_N = np.argsort(group_N, kind="stable")
    sorted_N = group_N[order_N]
    rank_N = np.empty_like(order_N)
    rank_N[order_N] = np.arange(len(group_N)) - np.searchsorted(sorted_N, sorted_N)
    return rank_N
