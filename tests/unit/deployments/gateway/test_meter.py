"""What a request's story does to the gateway's metrics, with an injected clock."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import AdmissionConfig
from cluster.errors import DeepsplitError, EngineRefused, Overloaded, Plane, Reason, StreamLost, Unauthenticated
from deployments.gateway.head import Head
from deployments.gateway.meter import RequestMeter, RequestMeters, State, outcome_of
from monitoring.metrics import MAX_TENANTS, OTHER_TENANTS, GatewayMetrics
from routing.requests.request import Grant, Priority, Tenant

TENANT = Tenant("search")
LABELS = {"class": "interactive", "tenant": "search"}


class World:
    """A gateway's meters on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.registry = CollectorRegistry()
        self.meters = RequestMeters(GatewayMetrics(self.registry), AdmissionConfig(), lambda: self.now_s)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def waiting(self) -> RequestMeter:
        meter = self.meters.request(Head("POST", "/v1/completions", "r1"), "tiny", generates=True)
        meter.identified(TENANT)
        meter.waits(Priority.INTERACTIVE)
        return meter

    def running(self, predicted_s: float | None = None, would_refuse: Reason | None = None) -> RequestMeter:
        meter = self.waiting()
        meter.admitted(Grant("t", "r", predicted_s, would_refuse))
        return meter


def test_a_stream_from_its_arrival_to_its_end() -> None:
    world = World()
    meter = world.waiting()
    assert world.value("deepsplit_waiting_requests", **{"class": "interactive"}) == 1
    world.now_s += 2
    meter.admitted(Grant("t", "r", 2.5))
    assert world.value("deepsplit_waiting_requests", **{"class": "interactive"}) == 0
    assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 1
    world.now_s += 1
    meter.progress(1)
    world.now_s += 0.2
    meter.progress(3)
    world.now_s += 0.4
    meter.progress(5)
    meter.end(State.RUNNING, None, 200, prompt_tokens=7, generated_tokens=5)
    by_class = {"class": "interactive"}
    assert world.value("deepsplit_running_requests", **by_class) == 0
    assert world.value("deepsplit_queue_seconds_sum", **by_class) == pytest.approx(2)
    assert world.value("deepsplit_ttft_seconds_sum", **by_class) == pytest.approx(3)
    error = "deepsplit_ttft_prediction_error_seconds_bucket"
    assert [world.value(error, le=bound, **by_class) for bound in ("-1.0", "-0.5", "10.0")] == [0, 1, 1]
    assert world.value("deepsplit_inter_token_seconds_sum", **by_class) == pytest.approx(0.6)
    assert world.value("deepsplit_inter_token_seconds_count", **by_class) == 2
    assert world.value("deepsplit_tpot_seconds_sum", **by_class) == pytest.approx(0.15)  # 4 tokens after the first
    assert world.value("deepsplit_request_seconds_sum", **by_class) == pytest.approx(3.6)
    assert world.value("deepsplit_requests_total", outcome="ok", **LABELS) == 1
    assert world.value("deepsplit_prompt_tokens_total", **LABELS) == 7
    assert world.value("deepsplit_generated_tokens_total", **LABELS) == 5


@pytest.mark.parametrize(("took_s", "met"), [(5.0, "true"), (5.1, "false")])  # admission.interactive.ttft_s is 5
def test_objectives_are_the_class_own(took_s: float, met: str) -> None:
    world = World()
    meter = world.running()
    world.now_s += took_s
    meter.progress(1)
    labels = {"class": "interactive", "slo": "ttft"}
    assert world.value("deepsplit_slo_requests_total", met=met, **labels) == 1
    assert world.value("deepsplit_slo_requests_total", met="false" if met == "true" else "true", **labels) == 0
    assert world.value("deepsplit_slo_threshold_seconds", **labels) == 5


def test_a_refusal_names_plane_and_reason_and_holds_no_place() -> None:
    world = World()
    meter = world.waiting()
    refusal = Overloaded("no", retry_after_s=1, plane=Plane.EXPERTS, reason=Reason.TTFT)
    meter.end(State.WAITING, refusal, 0, None, 0)
    labels = {"reason": "ttft", "plane": "experts", "class": "interactive"}
    assert world.value("deepsplit_refusals_total", **labels) == 1
    assert world.value("deepsplit_requests_total", outcome="overloaded", **LABELS) == 1
    assert world.value("deepsplit_waiting_requests", **{"class": "interactive"}) == 0
    assert world.value("deepsplit_request_seconds_count", **{"class": "interactive"}) is None


def test_what_shadow_mode_would_have_refused() -> None:
    world = World()
    world.running(would_refuse=Reason.TPOT)
    assert world.value("deepsplit_would_refuse_total", reason="tpot", **{"class": "interactive"}) == 1


def test_a_request_that_nobody_is_known_for() -> None:
    world = World()
    meter = world.meters.request(Head("POST", "/v1/completions", "r1"), "tiny", generates=True)
    meter.end(State.ARRIVED, Unauthenticated("no key"), 0, None, 0)
    unknown = {"class": "unknown", "tenant": "unknown"}
    assert world.value("deepsplit_requests_total", outcome="unauthenticated", **unknown) == 1


def test_a_stream_that_was_lost() -> None:
    world = World()
    world.running().end(State.RUNNING, StreamLost("gone"), 200, 7, 3)
    assert world.value("deepsplit_requests_total", outcome="stream_lost", **LABELS) == 1
    assert world.value("deepsplit_generated_tokens_total", **LABELS) == 3
    assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 0


def test_requests_that_generate_nothing_are_counted_apart() -> None:
    world = World()
    meter = world.meters.request(Head("POST", "/tokenize", "r1"), "tiny", generates=False)
    meter.identified(TENANT)
    meter.waits(Priority.INTERACTIVE)
    meter.admitted(Grant("t", "r", None))
    assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 0
    meter.end(State.RUNNING, None, 200, 7, 0)
    assert world.value("deepsplit_other_requests_total", path="/tokenize", outcome="ok") == 1


def test_resends_by_whether_the_client_had_something() -> None:
    world = World()
    meter = world.running()
    meter.resent(continued=False)
    meter.resent(continued=True)
    assert world.value("deepsplit_resends_total", kind="again") == 1
    assert world.value("deepsplit_resends_total", kind="continued") == 1


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (None, 200, "ok"), (None, 422, "client_error"), (None, 500, "engine_error"),
        (asyncio.CancelledError(), 0, "cancelled"), (GeneratorExit(), 200, "cancelled"),
        (RuntimeError("bug"), 200, "internal_error"), (DeepsplitError("x"), 200, "internal_error"),
        (StreamLost("x"), 200, "stream_lost"), (EngineRefused(400, "x"), 400, "client_error"),
        (EngineRefused(500, "x"), 500, "engine_error"),
    ],
)  # fmt: skip
def test_outcomes(error: BaseException | None, status: int, outcome: str) -> None:
    assert outcome_of(error, status) == outcome


def test_tenants_beyond_the_bound_share_a_label() -> None:
    world = World()
    labels = {world.meters.tenant_label(f"t{number}") for number in range(2 * MAX_TENANTS)}
    assert len(labels) == MAX_TENANTS + 1
    assert OTHER_TENANTS in labels
    assert world.meters.tenant_label("t0") == "t0"
