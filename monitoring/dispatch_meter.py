"""Dispatches, told to the metrics off the engine's thread: what costs a decode step is one append per layer."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from monitoring.deferred import Deferred
from monitoring.expert_load import ExpertLoad
from monitoring.metrics import DispatchMetrics


@dataclass(slots=True)
class DispatchSample:
    """One dispatch; the stages of its retries are summed. Seconds."""

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
    degraded_rows: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    retries: list[str] = field(default_factory=list)  # outcomes of the errors that caused them
    workers: list[tuple[str, float]] = field(default_factory=list)  # (worker, its queue and compute)
    failure: str = ""  # outcome of the error it ended with


class DispatchMeter:
    """Told by the engine's thread."""

    def __init__(self, metrics: DispatchMetrics, experts: ExpertLoad) -> None:
        self._metrics = metrics
        self._experts = experts
        self._changing = threading.Lock()  # of the set of workers
        self._workers: set[str] = set()
        self._samples = Deferred(self._add)
        self.record = self._samples.record  # a dispatch ended
        self.fold = self._samples.fold  # take in all that was recorded, now

    def chose(self, layer: int, expert_ids_TK: np.ndarray) -> None:
        """The router's choice for one dispatch."""
        self._experts.add(layer, expert_ids_TK)

    def placement(self, epoch: int, workers: Iterable[str]) -> None:
        """A new table: forget workers that are not in it."""
        with self._changing:
            self._metrics.epoch.set(epoch)
            live = set(workers)
            for gone in self._workers - live:
                for by_worker in (
                    self._metrics.worker_seconds,
                    self._metrics.worker_replies,
                    self._metrics.last_replies,
                ):
                    by_worker.remove(gone)
            for worker in live - self._workers:
                self._metrics.last_replies.labels(worker)
                self._metrics.worker_seconds.labels(worker)
                self._metrics.worker_replies.labels(worker)
            self._workers = live

    def _add(self, sample: DispatchSample) -> None:
        metrics = self._metrics
        metrics.rows.observe(sample.rows)
        metrics.seconds.observe(sample.total_s)
        metrics.bytes.labels("out").inc(sample.bytes_out)
        metrics.bytes.labels("in").inc(sample.bytes_in)
        metrics.uncovered_wait.inc(sample.uncovered_wait_s)
        metrics.degraded_rows.inc(sample.degraded_rows)
        for reason in sample.retries:
            metrics.retries.labels(reason).inc()
        if sample.failure:
            metrics.failures.labels(sample.failure).inc()
            return
        if sample.retries:
            metrics.failovers.inc()
        metrics.shared.observe(sample.shared_s)
        stages = {
            "pack": sample.pack_s, "send": sample.send_s, "wait": sample.wait_s, "compute": sample.compute_s,
            "return": sample.return_s, "combine": sample.combine_s,
        }  # fmt: skip
        for stage, seconds in stages.items():
            if seconds is not None:
                metrics.stage.labels(stage).observe(seconds)
        with self._changing:
            known = [(worker, seconds) for worker, seconds in sample.workers if worker in self._workers]
            for worker, seconds in known:
                metrics.worker_seconds.labels(worker).inc(seconds)
                metrics.worker_replies.labels(worker).inc()
            if len(known) > 1:
                metrics.last_replies.labels(max(known, key=lambda one: one[1])[0]).inc()
