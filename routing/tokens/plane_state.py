"""How an engine's expert workers do, on its way from the engine's process to its Serve replica.

A file, because the engine's worker process is connected to nothing else of ours; it lies beside the placement file,
which goes the other way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

FRESH_S = 2.0  # an engine that wrote nothing for this long is idle, and idle experts have no queue
_MEMORY_S = 1.0  # about how long a step counts in the mean


class StepQueueTime:
    """Mean waiting time per engine step, from the layers' dispatches. Not thread-safe; the clock comes in."""

    def __init__(self) -> None:
        self.steps = 0  # finished ones
        self.mean_s = 0.0  # per step, summed over its layers; newer steps weigh more
        self._first_layer: int | None = None
        self._step_s = 0.0
        self._finished_s = -math.inf

    def add(self, layer: int, queue_s: float, now_s: float) -> None:
        """One layer's dispatch waited `queue_s`. A step is over when the first MoE layer comes again."""
        if self._first_layer is None or layer < self._first_layer:
            self._first_layer = layer
        elif layer == self._first_layer:
            self.steps += 1
            share = 1.0 - math.exp((self._finished_s - now_s) / _MEMORY_S)
            self.mean_s += share * (self._step_s - self.mean_s)
            self._finished_s, self._step_s = now_s, 0.0
        self._step_s += queue_s


@dataclass(frozen=True)
class ExpertPlaneState:
    """What an engine says of its expert workers."""

    queue_s: float = 0.0  # that a step's rows wait there, summed over layers
    degraded: bool = False  # rows went without some of their experts lately


@dataclass(frozen=True)
class ExpertPlaneFile:
    """Replaced atomically by the engine's process and read by its Serve replica."""

    path: Path

    def write(self, plane: ExpertPlaneState) -> None:
        """Readers see the old state or the new one. Raises OSError."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"{plane.queue_s!r} {int(plane.degraded)}")
        partial.replace(self.path)

    def read(self, now_s: float) -> ExpertPlaneState:
        """Idle and whole if nothing was written lately. `now_s`: Unix time."""
        try:
            if now_s - self.path.stat().st_mtime > FRESH_S:
                return ExpertPlaneState()
            queue_s, degraded = self.path.read_text().split()
            return ExpertPlaneState(float(queue_s), degraded == "1")
        except FileNotFoundError:
            return ExpertPlaneState()
