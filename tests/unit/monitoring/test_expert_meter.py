"""An expert worker's batches in the metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from monitoring.expert_meter import BatchSample, ExpertMeter
from monitoring.metrics import ExpertMetrics


def test_batches_gemms_and_failures() -> None:
    registry = CollectorRegistry()
    meter = ExpertMeter(ExpertMetrics(registry))
    meter.batch(BatchSample(rows=5, compute_s=0.2, queue_s=(0.0, 0.3)))
    meter.batch(BatchSample(rows=1, compute_s=0.1, queue_s=(0.1,)))
    meter.gemms([3, 0, 2, 0])
    meter.failed("bad_frame")
    meter.fold()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"deepsplit_expert_{name}", labels)

    assert (value("batch_rows_count"), value("batch_rows_sum")) == (2, 6)
    assert value("busy_seconds_total") == pytest.approx(0.3)
    assert (value("queue_seconds_count"), value("queue_seconds_sum")) == (3, pytest.approx(0.4))
    assert (value("gemm_rows_count"), value("gemm_rows_sum")) == (2, 5)  # experts that nobody asked for are left out
    assert (value("requests_total", outcome="ok"), value("requests_total", outcome="bad_frame")) == (3, 1)
