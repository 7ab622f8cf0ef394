"""The placement table: which worker holds which experts. The directory publishes it, every dispatch reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from routing.tokens.dispatching.routes import UNCOVERED, Routes

__all__ = ["UNCOVERED", "PlacementFile", "PlacementTable", "WorkerEndpoint"]


@dataclass(frozen=True)
class WorkerEndpoint:
    """One live expert worker. `worker_id` is new with every process; `experts` maps layer to held expert ids."""

    worker_id: str
    address: str
    experts: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class PlacementTable:
    """All live workers at one epoch. Epochs only grow."""

    epoch: int
    workers: tuple[WorkerEndpoint, ...]

    def to_json(self) -> str:
        """Return JSON text that `from_json` reads back."""
        workers = [
            {"id": w.worker_id, "address": w.address, "experts": {str(k): list(v) for k, v in w.experts.items()}}
            for w in self.workers
        ]
        return json.dumps({"epoch": self.epoch, "workers": workers})

    @classmethod
    def from_json(cls, text: str) -> PlacementTable:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(
            data["epoch"],
            tuple(
                WorkerEndpoint(w["id"], w["address"], {int(k): tuple(v) for k, v in w["experts"].items()})
                for w in data["workers"]
            ),
        )

    def route(self, layer: int, num_experts: int, excluded: frozenset[str] = frozenset()) -> np.ndarray:
        """Return the worker's index for each expert of `layer`: int16[num_experts], UNCOVERED where no usable worker
        holds it. For several layers take `routes`.
        """
        return self.routes(num_experts, (layer,)).layer(layer, excluded)[:-1]

    def routes(self, num_experts: int, layers: Sequence[int] | None = None) -> Routes:
        """Return which worker computes which expert; of all layers unless some are named."""
        ids = [worker.worker_id for worker in self.workers]
        return Routes(ids, [worker.experts for worker in self.workers], num_experts, layers)


@dataclass
class PlacementFile:
    """The table as a small file that the attention replica replaces atomically and its engine processes read.

    The engine's worker is a child process without a connection to Ray. It asks for the file's modification time a few
    times a second (`routing.tokens.dispatching.placement_watch`). Not thread-safe.
    """

    path: Path
    _seen: tuple[int, int] = field(default=(0, 0), init=False)
    _table: PlacementTable = field(default=PlacementTable(0, ()), init=False)

    def write(self, table: PlacementTable) -> None:
        """Replace the file atomically: readers see the old table or the new one, never half of one."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(table.to_json())
        partial.replace(self.path)

    def current(self) -> PlacementTable:
        """Return the newest table, or an empty one (epoch 0) before the first was written."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return self._table
        seen = (stat.st_mtime_ns, stat.st_ino)
        if seen != self._seen:
            self._table = PlacementTable.from_json(self.path.read_text())
            self._seen = seen
        return self._table
