"""What an expert worker computes, told to the metrics off the computing threads."""

from __future__ import annotations

from dataclasses import dataclass

from monitoring.deferred import Deferred
from monitoring.metrics import ExpertMetrics


@dataclass(frozen=True, slots=True)
class BatchSample:
    """One batch of one layer. Seconds."""

    rows: int
    compute_s: float
    queue_s: tuple[float, ...]  # of each request in it


class ExpertMeter:
    """Any thread may tell it things."""

    def __init__(self, metrics: ExpertMetrics) -> None:
        self.metrics = metrics
        self._batches = Deferred(self._add_batch)
        self._gemms: Deferred[list[int]] = Deferred(self._add_gemms)

    def batch(self, sample: BatchSample) -> None:
        """Computed."""
        self._batches.record(sample)

    def gemms(self, rows_N: list[int]) -> None:
        """Rows of each held expert [N] in one batch; 0 for those that nobody asked for."""
        self._gemms.record(rows_N)

    def answered(self, outcome: str) -> None:
        """One request; `ok` or an error's outcome."""
        self.metrics.requests.labels(outcome).inc()

    def fold(self) -> None:
        """Take in all that was told so far, now."""
        self._batches.fold()
        self._gemms.fold()

    def _add_batch(self, sample: BatchSample) -> None:
        metrics = self.metrics
        metrics.batch_rows.observe(sample.rows)
        metrics.compute.observe(sample.compute_s)
        metrics.busy.inc(sample.compute_s)
        for seconds in sample.queue_s:
            metrics.queue.observe(seconds)

    def _add_gemms(self, rows_N: list[int]) -> None:
        for rows in rows_N:
            if rows:
                self.metrics.gemm_rows.observe(rows)
