"""Measures what an expert worker computes, off the computing threads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from monitoring.deferred import Deferred
from monitoring.metrics import ExpertMetrics


@dataclass(slots=True)  # frozen ones take longer to make
class BatchSample:
    """The measurements of one batch of one layer, in seconds."""

    rows: int
    compute_s: float
    queue_s: tuple[float, ...]  # of each request in it


class ExpertMeter:
    """Turns BatchSamples and the like into metrics. Thread-safe."""

    def __init__(self, metrics: ExpertMetrics) -> None:
        self.metrics = metrics
        self._batches = Deferred(self._add_batches)
        self._gemms = Deferred(self._add_gemms)
        self._failures = Deferred(self._add_failures)

    def batch(self, sample: BatchSample) -> None:
        """Record a batch that was computed."""
        self._batches.record(sample)

    def gemms(self, rows_N: np.ndarray) -> None:
        """Record the rows of each held expert, int64 [N], in one batch; 0 for those that nobody asked for."""
        self._gemms.record(rows_N)

    def failed(self, outcome: str) -> None:
        """Record a request that ended with an error. Those of a recorded batch count as `ok`."""
        self._failures.record(outcome)

    def fold(self) -> None:
        """Bring the metrics up to date with all that was recorded so far."""
        self._batches.fold()
        self._gemms.fold()
        self._failures.fold()

    def _add_batches(self, samples: list[BatchSample]) -> None:
        metrics = self.metrics
        metrics.batch_rows.observe([sample.rows for sample in samples])
        metrics.compute.observe([sample.compute_s for sample in samples])
        metrics.busy.inc(sum(sample.compute_s for sample in samples))
        metrics.requests.labels("ok").inc(sum(len(sample.queue_s) for sample in samples))
        metrics.queue.observe([seconds for sample in samples for seconds in sample.queue_s])

    def _add_gemms(self, batches: list[np.ndarray]) -> None:
        rows = np.concatenate(batches)
        self.metrics.gemm_rows.observe(rows[rows > 0].tolist())

    def _add_failures(self, outcomes: list[str]) -> None:
        for outcome, count in Counter(outcomes).items():
            self.metrics.requests.labels(outcome).inc(count)
