"""What a request's story does to the gateway's metrics, with an injected clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import AdmissionConfig
from cluster.errors import DeepsplitError, EngineRefused, Overloaded, Plane, Reason, StreamLost, Unauthenticated
from deployments.admission.waiting_room import Decider, WaitingRoom
from deployments.gateway.head import Head
from deployments.gateway.lease import BodyMemory, Lease
from deployments.gateway.meter import RequestMeter, outcome_of
from monitoring.metrics import MAX_TENANTS, OTHER_TENANTS, GatewayMetrics
from routing.requests.admission import Admitted, Refused
from routing.requests.prediction.prompt_size import PromptSize
from routing.requests.request import Ask, Grant, Priority, Tenant

TENANT = Tenant("search")
ASK = Ask("t", TENANT, Priority.INTERACTIVE, 7, 9, 1, (), None)
LABELS = {"class": "interactive", "tenant": "search"}


class Undecided(Decider):
    """Admission that leaves every decision to the test."""


class World:
    """Leases of a gateway on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.registry = CollectorRegistry()
        self.meter = RequestMeter(GatewayMetrics(self.registry), AdmissionConfig(), lambda: self.now_s, "tiny")
        self.room = WaitingRoom(lambda: self.now_s)
        self.room.decide_by(Undecided())

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def arrived(self, path: str = "/v1/completions") -> Lease:
        return Lease(Head("POST", path, "r1"), self.room, BodyMemory(1), PromptSize(), self.meter)

    @asynccontextmanager
    async def waiting(self, lease: Lease) -> AsyncIterator[asyncio.Task[Grant]]:
        """The lease waits for a decision until the end of the block, when it has one."""
        lease.tenant = TENANT
        asking = asyncio.create_task(lease.admit(ASK))
        await asyncio.sleep(0)
        yield asking
        with suppress(Overloaded):
            await asking

    async def running(self, predicted_s: float | None = None, would_refuse: Reason | None = None) -> Lease:
        lease = self.arrived()
        async with self.waiting(lease):
            self.room.decided(Admitted(Grant("t", "r", predicted_s, would_refuse)))
        return lease


def test_a_stream_from_its_arrival_to_its_end() -> None:
    async def scenario() -> None:
        lease = world.arrived()
        async with world.waiting(lease):
            assert world.value("deepsplit_waiting_requests", **by_class) == 1
            world.now_s += 2
            world.room.decided(Admitted(Grant("t", "r", 2.5)))
        assert world.value("deepsplit_waiting_requests", **by_class) == 0
        assert world.value("deepsplit_running_requests", **by_class) == 1
        world.now_s += 1
        lease.progress(7, 1)
        world.now_s += 0.2
        lease.progress(7, 3)
        world.now_s += 0.4
        lease.progress(7, 5)
        lease.status = 200
        lease.end(None)

    world = World()
    by_class = {"class": "interactive"}
    asyncio.run(scenario())
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
    async def scenario() -> None:
        lease = await world.running()
        world.now_s += took_s
        lease.progress(7, 1)

    world = World()
    asyncio.run(scenario())
    labels = {"class": "interactive", "slo": "ttft"}
    assert world.value("deepsplit_slo_requests_total", met=met, **labels) == 1
    assert world.value("deepsplit_slo_requests_total", met="false" if met == "true" else "true", **labels) == 0
    assert world.value("deepsplit_slo_threshold_seconds", **labels) == 5


def test_a_refusal_names_plane_and_reason_and_holds_no_place() -> None:
    async def scenario() -> None:
        lease = world.arrived()
        async with world.waiting(lease):
            refusal = Overloaded("no", retry_after_s=1, plane=Plane.EXPERTS, reason=Reason.TTFT)
            world.room.decided(Refused("t", refusal))
        lease.end(refusal)

    world = World()
    asyncio.run(scenario())
    labels = {"reason": "ttft", "plane": "experts", "class": "interactive"}
    assert world.value("deepsplit_refusals_total", **labels) == 1
    assert world.value("deepsplit_requests_total", outcome="overloaded", **LABELS) == 1
    assert world.value("deepsplit_waiting_requests", **{"class": "interactive"}) == 0
    assert world.value("deepsplit_request_seconds_count", **{"class": "interactive"}) is None


def test_what_shadow_mode_would_have_refused() -> None:
    world = World()
    asyncio.run(world.running(would_refuse=Reason.TPOT))
    assert world.value("deepsplit_would_refuse_total", reason="tpot", **{"class": "interactive"}) == 1


def test_a_request_that_nobody_is_known_for() -> None:
    world = World()
    world.arrived().end(Unauthenticated("no key"))
    unknown = {"class": "unknown", "tenant": "unknown"}
    assert world.value("deepsplit_requests_total", outcome="unauthenticated", **unknown) == 1


def test_a_stream_that_was_lost() -> None:
    async def scenario() -> None:
        lease = await world.running()
        lease.progress(7, 3)
        lease.end(StreamLost("gone"))

    world = World()
    asyncio.run(scenario())
    assert world.value("deepsplit_requests_total", outcome="stream_lost", **LABELS) == 1
    assert world.value("deepsplit_generated_tokens_total", **LABELS) == 3
    assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 0


def test_requests_that_generate_nothing_are_counted_apart() -> None:
    async def scenario() -> None:
        lease = world.arrived("/tokenize")
        async with world.waiting(lease):
            world.room.decided(Admitted(Grant("t", "r", None)))
        assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 0
        lease.counted(7, 0)
        lease.end(None)

    world = World()
    asyncio.run(scenario())
    assert world.value("deepsplit_other_requests_total", path="/tokenize", outcome="ok") == 1
    assert world.value("deepsplit_running_requests", **{"class": "interactive"}) == 0


def test_resends_by_whether_the_client_had_something() -> None:
    world = World()
    lease = world.arrived()
    lease.resent(continued=False)
    lease.resent(continued=True)
    assert lease.resends == 2
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
    labels = {world.meter.tenant_label(Tenant(f"t{number}")) for number in range(2 * MAX_TENANTS)}
    assert len(labels) == MAX_TENANTS + 1
    assert OTHER_TENANTS in labels
    assert world.meter.tenant_label(Tenant("t0")) == "t0"
