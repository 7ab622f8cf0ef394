"""Which worker computes which row of which expert, for all layers at once. Computed off the forward's thread.

An expert that one worker holds is all that worker's. The rows of one that several hold are divided by their weights:
they are dealt out in TURNS turns, of which each holder has its part (`split_combine.split` says which row has which
turn). Legend: L layers, E experts of a layer, R holders at most, Q turns (1 where no expert has a choice).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NO_HOLDER = -1  # in a list of holders: there is none any more
UNCOVERED = -1  # in a route: no usable worker holds the expert
NOBODY = np.iinfo(np.int16).max  # at the end of a route: the owner of NO_EXPERT
TURNS = 16  # weights are rounded to sixteenths; a holder gets one at least, so with more holders there are more turns
_LEAST_WEIGHT = 1e-4  # of an expert's greatest: whoever holds an expert gets some of its rows
_TINY = 1e-30
_MOST_EXCLUSIONS = 8  # sets of excluded workers whose routes are kept


class Routes:
    """The routes of one placement table: immutable but for a small cache, so threads may share it."""

    def __init__(
        self,
        worker_ids: Sequence[str],
        layers: Sequence[int],
        holders_LER: np.ndarray,
        weights_LER: np.ndarray,
        num_experts: int,
    ) -> None:
        """`holders_LER`: indices of `worker_ids`, NO_HOLDER where an expert has fewer than R. `weights_LER`: positive,
        in any unit. Experts from E to `num_experts` have no holder.
        """
        self._position = {layer: at for at, layer in enumerate(layers)}
        self._worker_ids = tuple(worker_ids)
        self._num_experts = num_experts
        self._holders_LER = holders_LER[:, :num_experts]
        weights_LER = np.where(self._holders_LER == NO_HOLDER, 0.0, weights_LER[:, :num_experts].astype(np.float64))
        weights_LER /= np.maximum(weights_LER.max(axis=2, keepdims=True, initial=0.0), _TINY)
        self._weights_LER = np.where(self._holders_LER == NO_HOLDER, 0.0, np.maximum(weights_LER, _LEAST_WEIGHT))
        self._nowhere = self._finished(np.full((1, 0, 1), UNCOVERED))[0]
        self._all = self._finished(_deal(self._holders_LER, self._weights_LER))
        self._without: dict[tuple[frozenset[str], int], np.ndarray] = {}

    def layer(self, layer: int, excluded: frozenset[str] = frozenset()) -> np.ndarray:
        """Return the route of a layer, int16[E + 1, Q]: by expert and turn the worker's index, UNCOVERED where no
        usable worker holds it, and NOBODY at the end, where the index NO_EXPERT (-1) finds it.

        Without the `excluded` workers, their turns go to other holders; all other turns stay where they are.
        """
        position = self._position.get(layer)
        if position is None:
            return self._nowhere
        return self._excluding(position, excluded) if excluded else self._all[position]

    def _excluding(self, position: int, excluded: frozenset[str]) -> np.ndarray:
        known = self._without.get((excluded, position))
        if known is None:
            known = self._reassigned(position, excluded)
            kept = list(self._without.items())[1 - _MOST_EXCLUSIONS * len(self._position) :]
            self._without = {**dict(kept), (excluded, position): known}
        return known

    def _reassigned(self, position: int, excluded: frozenset[str]) -> np.ndarray:
        out = [at for at, worker_id in enumerate(self._worker_ids) if worker_id in excluded]
        one = slice(position, position + 1)
        weights_1ER = np.where(np.isin(self._holders_LER[one], out), 0.0, self._weights_LER[one])
        others_1EQ = self._finished(_deal(self._holders_LER[one], weights_1ER))
        route_1EQ = self._all[one]
        return np.where(np.isin(route_1EQ, out), others_1EQ, route_1EQ)[0]

    def _finished(self, route_LEQ: np.ndarray) -> np.ndarray:
        layers, experts, turns = route_LEQ.shape
        whole_LEQ = np.full((layers, self._num_experts + 1, turns), UNCOVERED, dtype=np.int16)
        whole_LEQ[:, :experts] = route_LEQ
        whole_LEQ[:, -1] = NOBODY
        return whole_LEQ


def _deal(holders_LER: np.ndarray, weights_LER: np.ndarray) -> np.ndarray:
    """Return the holder of each turn, [L, E, Q]: each holder's turns are spread evenly over all of them, and experts
    begin at different turns, so that one turn of all experts is divided among their holders too.
    """
    layers, experts, most = holders_LER.shape
    if most <= 1:
        return np.where(weights_LER > 0, holders_LER, UNCOVERED) if most else np.full((layers, experts, 1), UNCOVERED)
    turns = max(TURNS, most)
    part_LER = _turns_of(weights_LER, turns)
    turn_LEQ = np.empty((layers, experts, turns), dtype=np.int16)
    due_LER = np.zeros_like(part_LER)
    for turn in range(turns):  # smooth weighted round robin: who is owed most has the next turn
        due_LER += part_LER
        next_LE1 = due_LER.argmax(axis=2)[:, :, None]
        turn_LEQ[:, :, turn] = np.take_along_axis(holders_LER, next_LE1, 2)[:, :, 0]
        np.put_along_axis(due_LER, next_LE1, np.take_along_axis(due_LER, next_LE1, 2) - turns, 2)
    begin_EQ = (np.arange(turns) + np.arange(experts)[:, None]) % turns
    turn_LEQ = np.take_along_axis(turn_LEQ, begin_EQ[None], 2)
    turn_LEQ[~(weights_LER > 0).any(axis=2)] = UNCOVERED
    return turn_LEQ


def _turns_of(weights_LER: np.ndarray, turns: int) -> np.ndarray:
    """Return how many of the turns each holder has: by largest remainder, one at least where its weight is not 0."""
    held_LER = weights_LER > 0
    total_LE1 = np.maximum(weights_LER.sum(axis=2, keepdims=True), _LEAST_WEIGHT)
    quota_LER = np.maximum(turns * weights_LER / total_LE1, held_LER)
    above_LER = quota_LER - held_LER  # gives what the raised ones have too much
    over_LE1 = np.maximum(quota_LER.sum(axis=2, keepdims=True) - turns, 0)
    quota_LER -= above_LER * over_LE1 / np.maximum(above_LER.sum(axis=2, keepdims=True), _LEAST_WEIGHT)
    part_LER = np.floor(quota_LER)
    left_LE1 = turns * held_LER.any(axis=2, keepdims=True) - part_LER.sum(axis=2, keepdims=True)
    rank_LER = (part_LER - quota_LER).argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    return (part_LER + (rank_LER < left_LE1)).astype(np.int32)
