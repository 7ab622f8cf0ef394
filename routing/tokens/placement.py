"""The placement table: which worker holds which experts. The directory publishes it, every dispatch reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

UNCOVERED = -1


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
        holds it.

        Where several workers hold an expert, the one with the fewest experts of this layer so far gets it, so the
        load of an excluded worker spreads over the other holders.
        """
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        for index, worker in enumerate(self.workers):
            if worker.worker_id not in excluded:
                for expert in worker.experts.get(layer, ()):
                    holders[expert].append(index)
        route_E = np.full(num_experts, UNCOVERED, dtype=np.int16)
        load = [0] * len(self.workers)
        # Experts with the least choice go first.
        for expert in sorted(range(num_experts), key=lambda e: (len(holders[e]), e)):
            if holders[expert]:
                chosen = min(holders[expert], key=lambda w: (load[w], w))
                route_E[expert] = chosen
                load[chosen] += 1
        return route_E


@dataclass
class PlacementFile:
    """The table as a small file that the attention replica replaces atomically and its engine processes read.

    The engine's worker is a child process without a connection to Ray. It asks for the file's modification time before
    each dispatch, which takes about 1 us.
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
