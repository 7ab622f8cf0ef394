"""Which worker holds which experts, which it is wanted to hold, and which it may drop. Pure; no clock.

A move is: a worker is wanted to hold more, loads it, and says so; a new table lists it; another is wanted to hold less,
and a new table no longer lists it; when every attention replica has that table, it may drop its copy. No expert is ever
without a listed holder for a move's sake, whatever dies in between, and any number of moves may be under way.

Legend: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from routing.tokens.share import Share


@dataclass
class _Worker:
    wanted_LE: np.ndarray  # bool
    held_LE: np.ndarray  # bool: as it says itself
    listed_LE: np.ndarray  # bool: in the table as a holder
    unlisted_LE: np.ndarray  # int64: number of the table that was the first not to list it; 0 for all others


class Holdings:
    """The experts of all workers. Not thread-safe."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self._shape = (len(layers), num_experts)
        self._workers: dict[str, _Worker] = {}
        self._holders_LE = np.zeros(self._shape, dtype=np.int32)
        self._acknowledged = 0
        self.tables = 0  # number of the present table; grows whenever what it lists changes

    # --- events ---

    def join(self, worker_id: str, wanted: np.ndarray) -> None:
        """A worker that holds nothing yet. `wanted`: bool [L, E]."""
        nothing_LE = np.zeros(self._shape, dtype=bool)
        unlisted_LE = np.zeros(self._shape, dtype=np.int64)
        self._workers[worker_id] = _Worker(wanted, nothing_LE, nothing_LE, unlisted_LE)

    def leave(self, worker_id: str) -> None:
        """A worker is gone, and so is what it held."""
        worker = self._workers.pop(worker_id)
        self._holders_LE -= worker.held_LE
        self.tables += bool(worker.listed_LE.any())
        self._list()

    def renumber(self, least: int) -> None:
        """Make the present table a new one, with the number `least` at least: something else of it has changed, such as
        an address, or somebody knows a table of an earlier directory with a greater number.
        """
        self.tables = max(self.tables + 1, least)

    def want(self, worker_id: str, wanted_LE: np.ndarray) -> None:
        """Change what a worker is wanted to hold."""
        worker = self._workers[worker_id]
        if not np.array_equal(worker.wanted_LE, wanted_LE):
            worker.wanted_LE = wanted_LE
            self._list()

    def hold(self, worker_id: str, held_LE: np.ndarray) -> None:
        """Record what a worker says that it holds."""
        worker = self._workers[worker_id]
        if not np.array_equal(worker.held_LE, held_LE):
            self._holders_LE += held_LE.astype(np.int32) - worker.held_LE
            worker.held_LE = held_LE
            self._list()

    def acknowledge(self, table: int) -> None:
        """Record that no attention replica uses a table before this one any more."""
        self._acknowledged = table

    # --- queries ---

    def keeps(self, worker_id: str) -> np.ndarray:
        """Return what a worker is to hold, bool [L, E]: what is wanted, and what it must not drop yet."""
        worker = self._workers[worker_id]
        used_LE = worker.listed_LE | (worker.unlisted_LE > self._acknowledged)
        return worker.wanted_LE | (worker.held_LE & used_LE)

    def settled(self, worker_id: str) -> bool:
        """Return whether a worker holds what is wanted and nothing else."""
        worker = self._workers[worker_id]
        return np.array_equal(worker.held_LE, worker.wanted_LE)

    def has(self, worker_id: str) -> np.ndarray:
        """Return what a worker holds or is wanted to hold, bool [L, E]."""
        worker = self._workers[worker_id]
        return worker.held_LE | worker.wanted_LE

    def listed(self, worker_id: str) -> Share:
        """Return for which experts the table names a worker."""
        return self.share(self._workers[worker_id].listed_LE)

    def holder_counts(self) -> np.ndarray:
        """Return how many workers hold each expert, int32 [L, E]."""
        return self._holders_LE

    def mask(self, share: Share) -> np.ndarray:
        """Return a share as bool [L, E]; layers and experts that the model does not have are left out."""
        mask_LE = np.zeros(self._shape, dtype=bool)
        for at, layer in enumerate(self.layers):
            ids = [expert for expert in share.get(layer, ()) if 0 <= expert < self._shape[1]]
            mask_LE[at, ids] = True
        return mask_LE

    def share(self, mask_LE: np.ndarray) -> Share:
        """Return the share whose `mask` this is."""
        return {
            layer: tuple(row_E.nonzero()[0].tolist())
            for layer, row_E in zip(self.layers, mask_LE, strict=True)
            if row_E.any()
        }

    def _list(self) -> None:
        """Decide who is in the table: the holders of an expert that are wanted to be; all holders where none is."""
        if not self._workers:
            return
        wanted_LE = np.logical_or.reduce([worker.held_LE & worker.wanted_LE for worker in self._workers.values()])
        changed = False
        for worker in self._workers.values():
            listed_LE = worker.held_LE & (worker.wanted_LE | ~wanted_LE)
            unlisted_LE = worker.held_LE & ~listed_LE
            worker.unlisted_LE[~unlisted_LE] = 0
            fresh_LE = unlisted_LE & (worker.unlisted_LE == 0)
            worker.unlisted_LE[fresh_LE] = self.tables + 1
            changed |= bool(fresh_LE.any()) or not np.array_equal(listed_LE, worker.listed_LE)
            worker.listed_LE = listed_LE
        self.tables += changed
