"""Dispatches in the metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from monitoring.dispatch_meter import DispatchMeter, DispatchSample
from monitoring.metrics import DispatchMetrics


class World:
    """An engine's meter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.meter = DispatchMeter(DispatchMetrics(self.registry))

    def record(self, sample: DispatchSample) -> None:
        self.meter.record(sample)

    def value(self, name: str, **labels: str) -> float | None:
        self.meter.fold()
        return self.registry.get_sample_value(f"deepsplit_dispatch_{name}", labels)


def sample(**fields: object) -> DispatchSample:
    made = DispatchSample(
        rows=3, total_s=1.0, pack_s=0.1, send_s=0.02, shared_s=0.2, wait_s=0.03, compute_s=0.4, return_s=0.05,
        combine_s=0.06, bytes_out=100, bytes_in=60,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_every_stage_of_a_dispatch() -> None:
    world = World()
    world.record(sample())
    expected = {"pack": 0.1, "send": 0.02, "wait": 0.03, "compute": 0.4, "return": 0.05, "combine": 0.06}
    assert {stage: world.value("stage_seconds_sum", stage=stage) for stage in expected} == pytest.approx(expected)
    assert world.value("shared_expert_seconds_sum") == pytest.approx(0.2)
    assert world.value("seconds_sum") == pytest.approx(1.0)
    assert world.value("rows_sum") == 3
    assert (world.value("bytes_total", direction="out"), world.value("bytes_total", direction="in")) == (100, 60)


def test_a_way_back_that_the_shared_expert_hid_is_not_guessed() -> None:
    world = World()
    world.record(sample(return_s=None))
    assert not world.value("stage_seconds_count", stage="return")
    assert world.value("stage_seconds_count", stage="compute") == 1


def test_a_failover_is_a_retry_that_ended_well() -> None:
    world = World()
    world.record(sample(retries=["worker_lost", "stale_placement"]))
    world.record(sample(retries=["worker_lost"], failure="uncovered"))
    assert world.value("retries_total", reason="worker_lost") == 2
    assert world.value("retries_total", reason="stale_placement") == 1
    assert world.value("failovers_total") == 1
    assert world.value("failures_total", reason="uncovered") == 1
    assert world.value("stage_seconds_count", stage="pack") == 1  # the one that failed has no whole stages


def test_the_slowest_of_several_workers_is_the_straggler() -> None:
    world = World()
    world.meter.placement(3, ["a", "b"])
    world.record(sample(workers=[("a", 0.1), ("b", 0.4)]))
    world.record(sample(workers=[("a", 0.1)]))  # alone: nobody waited for it rather than for another
    assert world.value("last_replies_total", expert_worker="a") == 0
    assert world.value("last_replies_total", expert_worker="b") == 1
    assert world.value("worker_replies_total", expert_worker="a") == 2
    assert world.value("worker_seconds_total", expert_worker="a") == pytest.approx(0.2)
    assert world.value("placement_epoch") == 3


def test_workers_that_left_leave_no_series() -> None:
    world = World()
    world.meter.placement(1, ["a", "b"])
    world.record(sample(workers=[("a", 0.1), ("b", 0.4)]))
    world.meter.fold()
    world.meter.placement(2, ["b", "c"])
    world.record(sample(workers=[("a", 0.1), ("b", 0.4)]))  # replied before it left
    assert world.value("worker_replies_total", expert_worker="a") is None
    assert world.value("worker_replies_total", expert_worker="b") == 2
    assert world.value("worker_replies_total", expert_worker="c") == 0


def test_workers_that_are_lost_or_set_aside() -> None:
    world = World()
    assert world.value("workers_set_aside", reason="worker_unusable") == 0
    world.meter.worker_lost("worker_silent")
    world.meter.worker_lost("worker_silent")
    assert world.value("workers_lost_total", reason="worker_silent") == 2
    world.meter.set_aside(["worker_unusable", "worker_failing", "worker_unusable"])
    assert world.value("workers_set_aside", reason="worker_unusable") == 2
    world.meter.set_aside(["worker_failing"])
    assert world.value("workers_set_aside", reason="worker_unusable") == 0
    assert world.value("workers_set_aside", reason="worker_failing") == 1


def test_waits_for_busy_workers() -> None:
    world = World()
    world.record(sample(backoff_s=0.5))
    assert world.value("backoff_seconds_total") == 0.5
