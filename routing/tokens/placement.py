"""The placement table: which worker holds which experts, and how their rows are divided among the holders.

The directory publishes it, every dispatch reads it. Legend: L MoE layers, E experts of a layer, R holders of an expert
at most, W workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from routing.tokens.dispatching.routes import NO_HOLDER, UNCOVERED, Routes

__all__ = ["NO_TABLE", "UNCOVERED", "PlacementFile", "PlacementTable", "Stamp", "WorkerEndpoint"]

_LEAST_WEIGHT = 1e-3  # of a holder that is to have none: it is one all the same
_MAGIC = b"deepsplit placement 1\n"


class Stamp(NamedTuple):
    """What tells tables apart: two directories never publish different ones under the same stamp."""

    incarnation: int  # of the directory, random; 0 where there is no table
    n: int  # of its tables, from 1 on


NO_TABLE = Stamp(0, 0)
# Part of an expert's rows that a worker gets: by worker id and layer, [E], in any unit.
Weights = Mapping[str, Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class WorkerEndpoint:
    """One live expert worker. `worker_id` is new with every process; `experts` maps layer to held expert ids."""

    worker_id: str
    address: str
    experts: Mapping[int, Sequence[int]] = field(compare=False)


@dataclass(frozen=True, eq=False)
class PlacementTable:
    """All live workers, what they hold, and which part of an expert's rows each of its holders gets.

    `workers` without their `experts`, which are in `holders_LER`: int16, indices of workers, NO_HOLDER where an expert
    has fewer than R. `weights_LER`: float16, positive, in any unit.
    """

    stamp: Stamp
    workers: tuple[WorkerEndpoint, ...]
    layers: tuple[int, ...]
    holders_LER: np.ndarray
    weights_LER: np.ndarray

    @classmethod
    def of(
        cls, stamp: Stamp, workers: Sequence[WorkerEndpoint], weights: Weights = MappingProxyType({})
    ) -> PlacementTable:
        """Return the table of what `workers` hold. `weights`: 1 for workers that have none."""
        layers = tuple(sorted({layer for worker in workers for layer in worker.experts}))
        experts = 1 + max((max(ids, default=-1) for worker in workers for ids in worker.experts.values()), default=-1)
        held_LWE = np.zeros((len(layers), len(workers), experts), dtype=bool)
        for at, worker in enumerate(workers):
            for layer, ids in worker.experts.items():
                held_LWE[layers.index(layer), at, list(ids)] = True
        holders_LER = _packed(held_LWE)
        weight_WLE = np.ones((len(workers) + 1, len(layers), experts), dtype=np.float16)  # the last: NO_HOLDER's
        for at, worker in enumerate(workers):
            for layer, weight_E in weights.get(worker.worker_id, {}).items():
                if layer in layers:
                    weight_WLE[at, layers.index(layer)] = np.maximum(weight_E[:experts], _LEAST_WEIGHT)
        weights_LER = weight_WLE[holders_LER, np.arange(len(layers))[:, None, None], np.arange(experts)[:, None]]
        return cls(stamp, tuple(workers), layers, holders_LER, weights_LER)

    @cached_property
    def encoded(self) -> bytes:
        """What `decode` reads back: a line of JSON, then both arrays."""
        head = {
            "stamp": self.stamp, "layers": self.layers, "shape": self.holders_LER.shape,
            "workers": [(worker.worker_id, worker.address) for worker in self.workers],
        }  # fmt: skip
        holders, weights = self.holders_LER.astype("<i2").tobytes(), self.weights_LER.astype("<f2").tobytes()
        return b"".join((_MAGIC, json.dumps(head).encode(), b"\n", holders, weights))

    @classmethod
    def decode(cls, data: bytes) -> PlacementTable:
        """Return the table that was `encoded`. Raises ValueError for anything else."""
        if not data.startswith(_MAGIC):
            raise ValueError("no placement table, or one of another version of deepsplit")
        end = data.index(b"\n", len(_MAGIC))
        head = json.loads(data[len(_MAGIC) : end])
        count = int(np.prod(head["shape"]))
        if len(data) != end + 1 + 4 * count:
            raise ValueError(f"a placement table of {len(data)} bytes, where its shape makes {end + 1 + 4 * count}")
        holders_LER = np.frombuffer(data, "<i2", count, end + 1).reshape(head["shape"])
        weights_LER = np.frombuffer(data, "<f2", count, end + 1 + 2 * count).reshape(head["shape"])
        workers = tuple(WorkerEndpoint(worker_id, address, {}) for worker_id, address in head["workers"])
        return cls(Stamp(*head["stamp"]), workers, tuple(head["layers"]), holders_LER, weights_LER)

    def holders(self) -> list[WorkerEndpoint]:
        """Return the workers with their experts."""
        listed = []
        for at, worker in enumerate(self.workers):
            held_LE = (self.holders_LER == at).any(axis=2)
            experts = {
                layer: tuple(held_E.nonzero()[0].tolist())
                for layer, held_E in zip(self.layers, held_LE, strict=True)
            }  # fmt: skip
            listed.append(replace(worker, experts=experts))
        return listed

    def covers(self, layers: Iterable[int], num_experts: int) -> bool:
        """Return whether every expert of these layers has a holder."""
        covered_L = (self.holders_LER != NO_HOLDER).any(axis=2).sum(axis=1) == num_experts
        return set(layers) <= {layer for layer, covered in zip(self.layers, covered_L, strict=True) if covered}

    @property
    def divides(self) -> bool:
        """Whether several workers hold the same expert."""
        return self.holders_LER.shape[2] > 1

    def routes(self, num_experts: int, factors: Mapping[str, float] | None = None) -> Routes:
        """Return which worker computes which row of which expert. `factors`: by worker id, of its weights."""
        ids = [worker.worker_id for worker in self.workers]
        weights_LER = self.weights_LER
        if factors:
            weights_LER = weights_LER * np.array([*(factors.get(name, 1.0) for name in ids), 1.0])[self.holders_LER]
        return Routes(ids, self.layers, self.holders_LER, weights_LER, num_experts)


def _packed(held_LWE: np.ndarray) -> np.ndarray:
    """Return the holders [L, E, R] of each expert, in order of worker."""
    count_LE = held_LWE.sum(axis=1)
    most = int(count_LE.max(initial=0))
    order_LEW = (~held_LWE).transpose(0, 2, 1).argsort(axis=2, kind="stable")[:, :, :most]
    return np.where(np.arange(most) < count_LE[:, :, None], order_LEW, NO_HOLDER).astype(np.int16)


@dataclass
class PlacementFile:
    """The table as a small file that the attention replica replaces atomically and its engine processes read.

    The engine's worker is a child process without a connection to Ray. It asks for the file's modification time a few
    times a second (`routing.tokens.dispatching.placement_watch`). Not thread-safe.
    """

    path: Path
    _seen: tuple[int, int] = field(default=(0, 0), init=False)
    _table: PlacementTable = field(default_factory=lambda: PlacementTable.of(NO_TABLE, ()), init=False)

    def write(self, table: PlacementTable) -> None:
        """Replace the file atomically: readers see the old table or the new one, never half of one."""
        self.write_encoded(table.encoded)

    def write_encoded(self, table: bytes) -> None:
        """Do the same with a table that is encoded already."""
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(table)
        partial.replace(self.path)

    def current(self) -> PlacementTable:
        """Return the newest table, or an empty one (NO_TABLE) before the first was written."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return self._table
        seen = (stat.st_mtime_ns, stat.st_ino)
        if seen != self._seen:
            self._table = PlacementTable.decode(self.path.read_bytes())
            self._seen = seen
        return self._table
