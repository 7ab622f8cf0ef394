"""Measures dispatches off the engine's thread: it costs a decode step one append per layer."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from monitoring.deferred import Deferred
from monitoring.metrics import SET_ASIDE_REASONS, DispatchMetrics


@dataclass(slots=True)
class DispatchSample:
    """The measurements of one dispatch, in seconds; the stages of its retries are summed."""

    rows: int
    total_s: float = 0.0
    pack_s: float = 0.0
    send_s: float = 0.0
    shared_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    return_s: float | None = None  # None: hidden by the shared expert
    combine_s: float = 0.0
    uncovered_wait_s: float = 0.0
    backoff_s: float = 0.0
    degraded_rows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    retries: list[str] = field(default_factory=list)  # outcomes of the errors that caused them
    workers: list[tuple[str, float]] = field(default_factory=list)  # (worker, its queue and compute)
    failure: str = ""  # outcome of the error it ended with


class DispatchMeter:
    """Turns DispatchSamples into metrics. The engine's thread records them."""

    def __init__(self, metrics: DispatchMetrics) -> None:
        self._metrics = metrics
        self._changing = threading.Lock()  # of the set of workers
        self._workers: set[str] = set()
        self._samples = Deferred(self._add)
        self.fold = self._samples.fold  # take in all that was recorded, now

    def record(self, sample: DispatchSample) -> None:
        """Record that a dispatch ended."""
        self._samples.record(sample)

    def placement(self, epoch: int, workers: Iterable[str]) -> None:
        """Record a new placement table: series of workers that are not in it go, those of new ones come."""
        metrics, live = self._metrics, set(workers)
        with self._changing:
            metrics.epoch.set(epoch)
            for by_worker in (metrics.worker_seconds, metrics.worker_replies, metrics.last_replies):
                for gone in self._workers - live:
                    by_worker.remove(gone)
                for come in live - self._workers:
                    by_worker.labels(come)  # from 0 on, or rates miss the first
            self._workers = live

    def worker_lost(self, outcome: str) -> None:
        """Record that a worker's link broke or that it was silent, whoever noticed."""
        self._metrics.workers_lost.labels(outcome).inc()

    def set_aside(self, outcomes: Iterable[str]) -> None:
        """Record the workers that are set aside now, by the outcome of the error that said so."""
        counts = Counter(outcomes)
        for reason in SET_ASIDE_REASONS:
            self._metrics.workers_set_aside.labels(reason).set(counts[reason])

    def _add(self, samples: list[DispatchSample]) -> None:
        metrics = self._metrics
        metrics.rows.observe([sample.rows for sample in samples])
        metrics.seconds.observe([sample.total_s for sample in samples])
        metrics.bytes.labels("out").inc(sum(sample.bytes_out for sample in samples))
        metrics.bytes.labels("in").inc(sum(sample.bytes_in for sample in samples))
        metrics.uncovered_wait.inc(sum(sample.uncovered_wait_s for sample in samples))
        metrics.backoff.inc(sum(sample.backoff_s for sample in samples))
        metrics.degraded_rows.inc(sum(sample.degraded_rows for sample in samples))
        for reason, count in Counter(reason for sample in samples for reason in sample.retries).items():
            metrics.retries.labels(reason).inc(count)
        for reason, count in Counter(sample.failure for sample in samples if sample.failure).items():
            metrics.failures.labels(reason).inc(count)
        self._add_stages([sample for sample in samples if not sample.failure])

    def _add_stages(self, samples: list[DispatchSample]) -> None:
        """Count the stages of dispatches that ended well."""
        metrics = self._metrics
        metrics.failovers.inc(sum(bool(sample.retries) for sample in samples))
        metrics.shared.observe([sample.shared_s for sample in samples])
        metrics.stage.observe([sample.pack_s for sample in samples], "pack")
        metrics.stage.observe([sample.send_s for sample in samples], "send")
        metrics.stage.observe([sample.wait_s for sample in samples], "wait")
        metrics.stage.observe([sample.compute_s for sample in samples], "compute")
        metrics.stage.observe([sample.return_s for sample in samples if sample.return_s is not None], "return")
        metrics.stage.observe([sample.combine_s for sample in samples], "combine")
        seconds: defaultdict[str, float] = defaultdict(float)
        replies: Counter[str] = Counter()
        last: Counter[str] = Counter()
        for sample in samples:
            for worker, worker_s in sample.workers:
                seconds[worker] += worker_s
                replies[worker] += 1
            if len(sample.workers) > 1:
                last[max(sample.workers, key=lambda one: one[1])[0]] += 1
        with self._changing:
            for worker in self._workers & replies.keys():
                metrics.worker_seconds.labels(worker).inc(seconds[worker])
                metrics.worker_replies.labels(worker).inc(replies[worker])
                metrics.last_replies.labels(worker).inc(last[worker])
