"""What one gateway holds open: how many, whose, for how long, and what draining does to it; on a clock of its own."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from cluster.config import GatewayConfig
from cluster.errors import DeepsplitError, Draining, Overloaded, Plane, QuotaExceeded, Reason, RequestTimeout
from deployments.gateway.open_requests import OpenRequests, Session
from routing.requests.request import Tenant
from tests.unit.deployments.gateway.clocked_loop import run

A, B, SMALL = Tenant("a"), Tenant("b"), Tenant("small", max_streams=2)


class Lease:
    """As much of a lease as is asked for here."""

    def __init__(self) -> None:
        self.cut_by: DeepsplitError | None = None

    def cut(self, error: DeepsplitError) -> None:
        self.cut_by = error


def open_requests(**settings: object) -> OpenRequests:
    return OpenRequests(GatewayConfig.model_validate(settings))


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> str:
    return "asked"


async def quiet(session: Session) -> asyncio.Task[None]:
    task = asyncio.ensure_future(session.next(never))
    await asyncio.sleep(0)
    return task


def test_requests_up_to_the_bound() -> None:
    requests = open_requests(max_streams=2)
    with requests.holding(Lease()):
        requests.check()
        with requests.holding(Lease()):
            with pytest.raises(Overloaded, match=r"holds 2 requests, its limit \(gateway.max_streams\)") as raised:
                requests.check()
            assert (raised.value.plane, raised.value.reason) == (Plane.GATEWAY, Reason.MAX_STREAMS)
            assert len(requests) == 2
        requests.check()


def test_a_quiet_session_gives_way_to_a_request_and_a_busy_one_does_not() -> None:
    async def scenario() -> None:
        requests = open_requests(max_streams=2)
        with requests.session(A) as first, requests.session(A) as second:
            idle = await quiet(first)
            assert await second.next(at_once) == "asked"
            with requests.holding(Lease()):  # what was asked on the second one
                requests.check()
                with requests.holding(Lease()):
                    with pytest.raises(Overloaded, match="needed its place"):
                        await idle
                    with pytest.raises(Overloaded, match="max_streams"):
                        requests.check()

    run(scenario())


def test_a_session_is_quiet_for_so_long_each_time() -> None:
    async def scenario() -> None:
        with open_requests(stream_idle_timeout_s=5).session(A) as session:
            for _ in range(3):
                await asyncio.sleep(4)
                assert await session.next(at_once) == "asked"
            with pytest.raises(RequestTimeout, match=r"gateway.stream_idle_timeout_s\) did not arrive within 5 s"):
                await session.next(never)
            assert now_s() == 17

    run(scenario())


def test_a_session_ends_with_its_age_but_not_within_a_request() -> None:
    async def scenario() -> None:
        with open_requests(connection_max_age_s=10).session(A) as session:
            await asyncio.sleep(9)
            assert await session.next(at_once) == "asked"
            await asyncio.sleep(9)  # its answer
            with pytest.raises(Draining, match="older than gateway"):
                await session.next(at_once)

    run(scenario())


def test_sessions_count_against_their_tenant() -> None:
    async def scenario() -> None:
        requests = open_requests()
        with ExitStack() as stack:
            for tenant in (SMALL, SMALL, A, A, A):
                stack.enter_context(requests.session(tenant))
            with pytest.raises(QuotaExceeded) as raised, requests.session(SMALL):
                pytest.fail("a third one was let in")
            assert (raised.value.plane, raised.value.reason) == (Plane.QUOTA, Reason.MAX_STREAMS)
        with requests.session(SMALL), requests.session(SMALL):
            pass

    run(scenario())


def test_what_quiet_sessions_may_receive_is_bounded() -> None:
    async def scenario() -> None:
        requests = open_requests(max_body_mib=8, max_bodies_mib=24)
        with ExitStack() as stack:
            idle = [await quiet(stack.enter_context(requests.session(A))) for _ in range(3)]
            assert await stack.enter_context(requests.session(B)).next(at_once) == "asked"
            with pytest.raises(Overloaded, match="needed its place"):
                await idle[0]
            assert not any(one.done() for one in idle[1:])
            assert now_s() == 1  # the least that each is given

    run(scenario())


def test_draining() -> None:
    async def scenario() -> None:
        requests = open_requests()
        with requests.session(A) as idle, requests.session(A) as busy, requests.holding(lease := Lease()):
            waiting = await quiet(idle)
            draining = asyncio.ensure_future(requests.drain(5))
            with pytest.raises(Draining, match="open the call again"):
                await waiting
            for refused in (requests.check, lambda: requests.session(A).__enter__()):
                with pytest.raises(Draining, match="send the request again"):
                    refused()
            assert now_s() == 0
            await asyncio.sleep(3)
            assert (lease.cut_by, draining.done()) == (None, False)
            await asyncio.sleep(2.1)
            assert isinstance(lease.cut_by, Draining)
            assert "was not done within 5 s" in str(lease.cut_by)
            with pytest.raises(Draining, match="open the call again"):
                await busy.next(at_once)
        await draining
        told = {requests_refused(requests).retry_after_s for _ in range(20)}
        assert len(told) > 10, "all would come back at once"

    run(scenario())


def requests_refused(requests: OpenRequests) -> Draining:
    with pytest.raises(Draining) as raised:
        requests.check()
    return raised.value


def test_draining_without_requests_takes_no_time() -> None:
    async def scenario() -> None:
        await open_requests().drain(30)
        assert now_s() == 0

    run(scenario())


def test_a_session_that_waits_for_its_turn_takes_no_request_once_the_gateway_stops() -> None:
    async def scenario() -> None:
        requests = open_requests(max_bodies_mib=8, max_body_mib=8)  # one may receive at a time
        with requests.session(A) as first, requests.session(B) as second:
            holding = await quiet(first)
            waiting = asyncio.ensure_future(second.next(at_once))
            await asyncio.sleep(0)
            await requests.drain(5.0)
            with pytest.raises(Draining):
                await holding
            with pytest.raises(Draining):
                await waiting

    run(scenario())
