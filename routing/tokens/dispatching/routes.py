"""Which worker computes which expert, for all layers at once. Computed off the forward's thread.

Legend: L layers, W workers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

UNCOVERED = -1  # in a route: no usable worker holds the expert
NOBODY = np.iinfo(np.int16).max  # at the end of a route: the owner of NO_EXPERT
_MOST_EXCLUSIONS = 8  # sets of excluded workers whose routes are kept


class Routes:
    """The routes of one placement table: immutable but for a small cache, so threads may share it."""

    def __init__(
        self,
        worker_ids: Sequence[str],
        held: Sequence[Mapping[int, Sequence[int]]],
        num_experts: int,
        layers: Sequence[int] | None = None,
    ) -> None:
        """`held`: by worker, layer to expert ids. `layers`: only these; all that somebody holds without.

        Where several workers hold an expert, the one with the fewest experts of the layer so far gets it; experts with
        the least choice go first.
        """
        if layers is None:
            layers = sorted({layer for experts in held for layer in experts})
        self._position = {layer: at for at, layer in enumerate(layers)}
        self._worker_ids = tuple(worker_ids)
        self._held_LWE = np.zeros((len(layers), len(held), num_experts), dtype=bool)
        for worker, experts in enumerate(held):
            for layer, ids in experts.items():
                if layer in self._position:
                    self._held_LWE[self._position[layer], worker, list(ids)] = True
        route_LE = np.full((len(layers), num_experts), UNCOVERED, dtype=np.int16)
        self._nowhere = _with_nobody(np.full((1, num_experts), UNCOVERED, dtype=np.int16))[0]
        _assign(self._held_LWE, np.ones(route_LE.shape, dtype=bool), route_LE)
        self._all = _with_nobody(route_LE)
        self._without: dict[frozenset[str], np.ndarray] = {}

    def layer(self, layer: int, excluded: frozenset[str] = frozenset()) -> np.ndarray:
        """Return the route of a layer, int16[E + 1]: by expert the worker's index, UNCOVERED where no usable worker
        holds it, and NOBODY at the end, where the index NO_EXPERT (-1) finds it.

        Without the `excluded` workers, their experts go to other holders; all other experts stay where they are.
        """
        position = self._position.get(layer)
        if position is None:
            return self._nowhere
        return (self._excluding(excluded) if excluded else self._all)[position]

    def _excluding(self, excluded: frozenset[str]) -> np.ndarray:
        known = self._without.get(excluded)
        if known is None:
            known = self._reassigned(excluded)
            self._without = {**dict(list(self._without.items())[1 - _MOST_EXCLUSIONS :]), excluded: known}
        return known

    def _reassigned(self, excluded: frozenset[str]) -> np.ndarray:
        out = [at for at, worker_id in enumerate(self._worker_ids) if worker_id in excluded]
        held_LWE = self._held_LWE.copy()
        held_LWE[:, out] = False
        route_LE = self._all[:, :-1].copy()
        orphans_LE = np.isin(route_LE, out)
        route_LE[orphans_LE] = UNCOVERED
        _assign(held_LWE, orphans_LE, route_LE)
        return _with_nobody(route_LE)


def _with_nobody(route_LE: np.ndarray) -> np.ndarray:
    return np.pad(route_LE, ((0, 0), (0, 1)), constant_values=NOBODY)


def _assign(held_LWE: np.ndarray, todo_LE: np.ndarray, route_LE: np.ndarray) -> None:
    """Give each expert of `todo_LE` to the holder with the fewest experts of its layer, in `route_LE`, in place. One
    step takes one expert of every layer.
    """
    layers, workers, experts = held_LWE.shape
    if not workers or not layers:
        return
    holders_LE = held_LWE.sum(axis=1)
    # Those with one holder have no choice, and are most experts of most clusters.
    settled_LE = todo_LE & (holders_LE == 1)
    route_LE[settled_LE] = held_LWE.argmax(axis=1)[settled_LE]
    load_LW = np.stack([np.bincount(route_E[route_E >= 0], minlength=workers) for route_E in route_LE])
    todo_LE = todo_LE & (holders_LE > 1)
    order_LE = np.where(todo_LE, holders_LE, workers + 1).argsort(axis=1, kind="stable")
    every_L = np.arange(layers)
    for step in range(int(todo_LE.sum(axis=1).max())):
        expert_L = order_LE[:, step]
        may_LW = held_LWE[every_L, :, expert_L] & todo_LE[every_L, expert_L][:, None]
        worker_L = np.where(may_LW, load_LW, experts + 1).argmin(axis=1)
        some_L = np.flatnonzero(may_LW.any(axis=1))
        route_LE[some_L, expert_L[some_L]] = worker_L[some_L]
        load_LW[some_L, worker_L[some_L]] += 1
