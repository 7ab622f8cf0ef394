"""The state of the expert plane as an engine sees it, passed from the engine's process to its Serve replica.

It travels in a file, because the engine's worker process has no connection to Ray. The placement file beside it goes
the other way.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
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
        """Record that one layer's dispatch waited `queue_s`. A step ends when the first MoE layer comes again."""
        if self._first_layer is None or layer < self._first_layer:
            self._first_layer = layer
        elif layer == self._first_layer:
            self.steps += 1
            weight = 1.0 - math.exp((self._finished_s - now_s) / _MEMORY_S)
            self.mean_s += weight * (self._step_s - self.mean_s)
            self._finished_s, self._step_s = now_s, 0.0
        self._step_s += queue_s


@dataclass(frozen=True)
class ExpertPlaneState:
    """What an engine reports of its expert workers."""

    queue_s: float = 0.0  # seconds that the rows of a step wait in workers' queues, summed over layers
    degraded: bool = False  # lately, rows were computed without some of their experts


@dataclass(frozen=True)
class ExpertPlaneFile:
    """A small file that the engine's process replaces atomically and its Serve replica reads."""

    path: Path

    def write(self, plane: ExpertPlaneState) -> None:
        """Replace the file: readers see the old state or the new one. Raises OSError."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(f"{plane.queue_s!r} {int(plane.degraded)}")
        partial.replace(self.path)

    def read(self, now_s: float) -> ExpertPlaneState:
        """Return the last state, or that of an idle plane if nothing was written lately. `now_s`: Unix time."""
        try:
            if now_s - self.path.stat().st_mtime > FRESH_S:
                return ExpertPlaneState()
            queue_s, degraded = self.path.read_text().split()
            return ExpertPlaneState(float(queue_s), degraded == "1")
        except FileNotFoundError:
            return ExpertPlaneState()


class PlaneReport:
    """Writes the state that dispatches add up to into a file. Thread-safe."""

    def __init__(self, file: ExpertPlaneFile | None, degraded_at: Callable[[float], bool]) -> None:
        """`degraded_at`: whether rows were computed without some of their experts shortly before a monotonic time."""
        self._file = file
        self._degraded_at = degraded_at
        self._adding = threading.Lock()
        self._queue = StepQueueTime()
        self._written_steps = 0

    def add(self, layer: int, queue_s: float, now_s: float) -> None:
        """Record that the rows of one layer waited `queue_s` at the workers. `now_s`: monotonic."""
        with self._adding:
            self._queue.add(layer, queue_s, now_s)

    def write(self, now_s: float) -> None:
        """Write the file if a step was finished since the last time."""
        if self._file is None or self._queue.steps == self._written_steps:
            return
        self._written_steps = self._queue.steps
        with contextlib.suppress(OSError):  # advice for admission; dispatches do not depend on it
            self._file.write(ExpertPlaneState(self._queue.mean_s, self._degraded_at(now_s)))
