"""A histogram that takes many values at once, for paths where prometheus_client's own (2 us a value) would show."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class BulkHistogram(Collector):
    """A histogram with at most one label, exposed as Prometheus expects."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """`buckets`: upper bounds, ascending, without +Inf."""
        assert len(labelnames) <= 1
        self._name = name
        self._documentation = documentation
        self._labelnames = tuple(labelnames)
        self._bounds_B = np.asarray(buckets, dtype=np.float64)
        self._names_B = [floatToGoString(bound) for bound in (*buckets, float("inf"))]
        self._lock = threading.Lock()
        self._counts_B: dict[str, np.ndarray] = {}  # by label value; one more than there are bounds
        self._sums: dict[str, float] = {}
        if not labelnames:
            self.observe((), "")
        registry.register(self)

    def observe(self, values: Sequence[float], label: str = "") -> None:
        """Count `values`, all under one value of the label."""
        found = np.asarray(values, dtype=np.float64)
        counts_B = np.bincount(np.searchsorted(self._bounds_B, found), minlength=len(self._names_B))
        with self._lock:
            if label in self._counts_B:
                self._counts_B[label] += counts_B
                self._sums[label] += float(found.sum())
            else:
                self._counts_B[label], self._sums[label] = counts_B, float(found.sum())

    def describe(self) -> Iterable[Metric]:
        """Yield the family, without samples."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterable[Metric]:
        """Yield the family with its samples."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
        with self._lock:
            for label, counts_B in self._counts_B.items():
                cumulative = zip(self._names_B, np.cumsum(counts_B).astype(float), strict=True)
                family.add_metric([label] if self._labelnames else [], list(cumulative), self._sums[label])
        yield family
