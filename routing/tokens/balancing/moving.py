"""Moves experts from where they are to where they serve better, one move per layer and round.

A move loads an expert on a worker, into a free slot or in the place of a redundant replica, so that neither capacity
nor floor is ever violated and every move stands alone. An expert changes workers by two moves: the new replica makes
the old one redundant, and a later move takes its place.

Legend: L layers, N some of them, E experts of a layer, W workers, P slots of a layer, S slots of a worker, R replicas.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from routing.tokens.balancing.building import same_domain
from routing.tokens.balancing.candidates import Candidates, best_of, candidates, trials, victims
from routing.tokens.balancing.division import divide
from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.loss import cost_L, missing_LE, times_L, uneven_L
from routing.tokens.balancing.slots import EMPTY, Slots

_ROUNDS = 6  # of division after a move: what a move changes is mostly near it
_TRIES = 4  # moves in a row without progress after which a layer is left as it is
_PROGRESS = 1e-4  # share of a layer's time


@dataclass(frozen=True)
class Step:
    """One move of one layer."""

    expert: int
    worker: int
    replaces: int | None
    gain_s: float
    mends: bool  # the floor asks for it
    covers: bool  # no worker held the expert


@dataclass(eq=False)
class Mover:
    """Carries moves out on `slots` and keeps, by layer, what was moved and the placement after each move."""

    slots: Slots
    fleet: Fleet
    loss_weight: float
    steps: list[list[Step]] = field(init=False)
    stages: list[list[tuple[np.ndarray, np.ndarray]]] = field(init=False)  # (workers_ER, weights_ER) after each step

    def __post_init__(self) -> None:
        self.steps = [[] for _ in self.slots.every_L]
        self.stages = [[] for _ in self.slots.every_L]

    def mend(self) -> None:
        """Bring experts up to the floor where there is room, those without any replica first, then by load."""
        slots, fleet = self.slots, self.fleet
        missing_LE_ = missing_LE(slots, fleet)
        while (open_L := np.flatnonzero(missing_LE_.any(axis=1))).size:
            some = slots.of(open_L)
            urgency_NE = np.where(some.copies_LE == 0, 2.0, 1.0) * (missing_LE_[open_L] > 0)
            share_NE = some.loads_LE / (some.loads_LE.sum(axis=1, keepdims=True) + 1e-30)
            expert_N = (urgency_NE * 2 + share_NE * (urgency_NE > 0)).argmax(axis=1)
            held_NW = some.held_LW(expert_N)
            victim_NW, cost_NW = victims(some, fleet)
            may_NW = np.isfinite(cost_NW) & ~same_domain(held_NW, fleet.spread_WD)
            may_NW &= (some.copies_LE[some.every_L, expert_N] < some.slot_LER.shape[2])[:, None]
            time_NW = (some.load_LW() + some.loads_LE[some.every_L, expert_N][:, None]) / fleet.rows_per_s_W
            worker_N = np.where(may_NW, time_NW, np.inf).argmin(axis=1)
            done_N = np.flatnonzero(may_NW.any(axis=1))
            missing_LE_[open_L, expert_N] = np.where(may_NW.any(axis=1), missing_LE_[open_L, expert_N] - 1, 0)
            slot_N = victim_NW[some.every_L, worker_N]
            tried = self._try(some, Candidates(done_N, expert_N[done_N], worker_N[done_N], slot_N[done_N]))
            self._keep(tried, np.arange(len(done_N)), open_L[done_N], mends=True)

    def improve(self, rounds: int, least_gain: float) -> None:
        """Relieve the slowest worker of each layer, at most `rounds` times.

        `least_gain`: share of a layer's time that there must be to win for another try.
        """
        slots, fleet = self.slots, self.fleet
        tries_L, moves_L = np.zeros((2, len(slots.loads_LE)), dtype=np.int64)
        banned_LEW = np.zeros((*slots.loads_LE.shape, len(fleet.rows_per_s_W)), dtype=bool)
        for _ in range(rounds + _TRIES):
            unlevel_L = uneven_L(slots, fleet, least_gain)
            open_L = np.flatnonzero(unlevel_L & (tries_L < _TRIES) & (moves_L < rounds))
            if not open_L.size:
                break
            some = slots.of(open_L)
            found = candidates(some, fleet, banned_LEW[open_L], trials(len(open_L)))
            tried = self._try(some, found)
            best_N, at_N = tried.best(len(open_L))
            good_N = np.flatnonzero(best_N >= 0)
            self._keep(tried, at_N[good_N], open_L[good_N])
            moves_L[open_L[good_N]] += 1
            progress_N = best_N > _PROGRESS * times_L(some, fleet)
            tries_L[open_L] = np.where(progress_N, 0, tries_L[open_L] + 1)
            tries_L[open_L[best_N == -np.inf]] = _TRIES  # nothing to try
            bad_K = np.flatnonzero(tried.gain_K < 0)
            banned_LEW[open_L[found.layer_K[bad_K]], found.expert_K[bad_K], found.worker_K[bad_K]] = True

    def _try(self, some: Slots, found: Candidates) -> _Tried:
        after = some.of(found.layer_K)
        replaced_K = after.expert_LP[after.every_L, found.slot_K]
        full_K = np.flatnonzero(replaced_K != EMPTY)
        after.clear(full_K, found.slot_K[full_K])
        covers_K = after.copies_LE[after.every_L, found.expert_K] == 0
        after.put(after.every_L, found.expert_K, found.slot_K)
        divide(after, self.fleet.rows_per_s_W, _ROUNDS)
        before_N = cost_L(some, self.fleet, self.loss_weight)
        gain_K = before_N[found.layer_K] - cost_L(after, self.fleet, self.loss_weight)
        return _Tried(found, after, replaced_K, covers_K, gain_K)

    def _keep(self, tried: _Tried, at_N: np.ndarray, layer_N: np.ndarray, mends: bool = False) -> None:
        """Take candidate `at_N` over in `layer_N`."""
        self.slots.take(layer_N, tried.after, at_N)
        placement = tried.after.of(at_N).placement()
        for n, (at, layer) in enumerate(zip(at_N, layer_N, strict=True)):
            replaced = int(tried.replaced_K[at])
            self.steps[layer].append(
                Step(
                    int(tried.found.expert_K[at]), int(tried.found.worker_K[at]),
                    None if replaced == EMPTY else replaced, float(tried.gain_K[at]), mends, bool(tried.covers_K[at]),
                )
            )  # fmt: skip
            self.stages[layer].append((placement.workers_LER[n], placement.weights_LER[n]))


@dataclass(frozen=True, eq=False)
class _Tried:
    """K candidates, each carried out on its own copy of its layer."""

    found: Candidates
    after: Slots
    replaced_K: np.ndarray  # EMPTY where there was room
    covers_K: np.ndarray
    gain_K: np.ndarray  # seconds

    def best(self, layers: int) -> tuple[np.ndarray, np.ndarray]:
        """The greatest gain of each layer, -inf where nothing was tried, and the candidate with it."""
        return best_of(self.found.layer_K, self.gain_K, layers)
