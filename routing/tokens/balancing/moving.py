"""Moves experts from where they are to where they serve better, one move per layer and round.

A move loads an expert on a worker, into a free slot or in the place of a redundant replica, so that neither capacity
nor floor is ever violated and every move stands alone. An expert changes workers by two moves: the new replica makes
the old one redundant, and a later move takes its place.

Legend: L layers, N some of them, K candidates, E experts of a layer, W workers.
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

_DIVISIONS = 6  # rounds after a move: what it changes is mostly near it
_TRIES = 3  # moves in a row without progress after which a layer is left as it is
_PROGRESS = 1e-4  # share of a layer's time


@dataclass(frozen=True)
class Step:
    """One move of one layer, and the layer after it."""

    expert: int
    worker: int
    replaces: int | None
    gain_s: float
    mends: bool  # the floor asks for it
    covers: bool  # no worker held the expert
    after: Slots


@dataclass(eq=False)
class Mover:
    """Carries moves out on `slots` and keeps what was moved, by layer."""

    slots: Slots
    fleet: Fleet
    loss_weight: float
    steps: list[list[Step]] = field(init=False)
    _cost_L: np.ndarray = field(init=False)  # seconds, as the layers are now

    def __post_init__(self) -> None:
        self.steps = [[] for _ in self.slots.every_L]
        self._cost_L = cost_L(self.slots, self.fleet, self.loss_weight)

    def mend(self) -> None:
        """Bring experts up to the floor where there is room, those without any replica first, then by load."""
        slots, fleet = self.slots, self.fleet
        below_LE = missing_LE(slots, fleet)
        share_LE = slots.loads_LE / slots.loads_LE.sum(axis=1, keepdims=True)
        while (open_L := np.flatnonzero(below_LE.any(axis=1))).size:
            some = slots.of(open_L)
            urgency_NE = np.where(some.copies_LE == 0, 2.0, 0.0) + share_LE[open_L]
            expert_N = np.where(below_LE[open_L] > 0, urgency_NE, -1.0).argmax(axis=1)
            slot_NW, seconds_NW = victims(some, fleet)
            may_NW = np.isfinite(seconds_NW) & ~same_domain(some.held_LW(expert_N), fleet.spread_WD)
            may_NW &= (some.copies_LE[some.every_L, expert_N] < some.slot_LER.shape[2])[:, None]
            rows_N1 = some.loads_LE[some.every_L, expert_N][:, None]
            worker_N = np.where(may_NW, (some.load_LW() + rows_N1) / fleet.rows_per_s_W, np.inf).argmin(axis=1)
            found_N = may_NW.any(axis=1)
            below_LE[open_L, expert_N] = np.where(found_N, below_LE[open_L, expert_N] - 1, 0)
            done_N = np.flatnonzero(found_N)
            slot_N = slot_NW[done_N, worker_N[done_N]]
            tried = self._try(some, Candidates(done_N, expert_N[done_N], worker_N[done_N], slot_N), open_L)
            self._keep(tried, np.arange(len(done_N)), open_L[done_N], mends=True)

    def improve(self, rounds: int, least_gain: float) -> None:
        """Relieve the slowest worker of each layer, at most `rounds` times.

        `least_gain`: share of a layer's time that there must be to win for another try.
        """
        slots, fleet = self.slots, self.fleet
        tries_L, moves_L = np.zeros((2, len(slots.loads_LE)), dtype=np.int64)
        banned_LEW = np.zeros((*slots.loads_LE.shape, len(fleet.rows_per_s_W)), dtype=bool)
        for _ in range(rounds + _TRIES):
            open_L = np.flatnonzero(uneven_L(slots, fleet, least_gain) & (tries_L < _TRIES) & (moves_L < rounds))
            if not open_L.size:
                break
            some = slots.of(open_L)
            found = candidates(some, fleet, banned_LEW[open_L], trials(len(open_L)))
            tried = self._try(some, found, open_L)
            best_N, at_N = best_of(found.layer_K, tried.gain_K, len(open_L))
            good_N = np.flatnonzero(best_N >= 0)
            progress_N = best_N > _PROGRESS * times_L(some, fleet)
            tries_L[open_L] = np.where(progress_N, 0, np.where(best_N == -np.inf, _TRIES, tries_L[open_L] + 1))
            moves_L[open_L[good_N]] += 1
            self._keep(tried, at_N[good_N], open_L[good_N])
            bad_K = np.flatnonzero(tried.gain_K < 0)
            banned_LEW[open_L[found.layer_K[bad_K]], found.expert_K[bad_K], found.worker_K[bad_K]] = True

    def _try(self, some: Slots, found: Candidates, layer_N: np.ndarray) -> _Tried:
        """Carry each candidate out on a copy of its layer of `some`."""
        after = some.of(found.layer_K)
        replaced_K = after.expert_LP[after.every_L, found.slot_K]
        full_K = np.flatnonzero(replaced_K != EMPTY)
        after.clear(full_K, found.slot_K[full_K])
        covers_K = after.copies_LE[after.every_L, found.expert_K] == 0
        after.put(after.every_L, found.expert_K, found.slot_K)
        divide(after, self.fleet.rows_per_s_W, _DIVISIONS)
        cost_K = cost_L(after, self.fleet, self.loss_weight)
        return _Tried(found, after, replaced_K, covers_K, cost_K, self._cost_L[layer_N[found.layer_K]] - cost_K)

    def _keep(self, tried: _Tried, at_N: np.ndarray, layer_N: np.ndarray, mends: bool = False) -> None:
        """Take candidate `at_N` over in `layer_N`."""
        self.slots.take(layer_N, tried.after, at_N)
        self._cost_L[layer_N] = tried.cost_K[at_N]
        for at, layer in zip(at_N.tolist(), layer_N.tolist(), strict=True):
            replaced = int(tried.replaced_K[at])
            step = Step(
                int(tried.found.expert_K[at]), int(tried.found.worker_K[at]), None if replaced == EMPTY else replaced,
                float(tried.gain_K[at]), mends, bool(tried.covers_K[at]), tried.after.view(at),
            )  # fmt: skip
            self.steps[layer].append(step)


@dataclass(frozen=True, eq=False)
class _Tried:
    """K candidates, each carried out on its own copy of its layer."""

    found: Candidates
    after: Slots
    replaced_K: np.ndarray  # EMPTY where there was room
    covers_K: np.ndarray
    cost_K: np.ndarray  # seconds
    gain_K: np.ndarray  # seconds
