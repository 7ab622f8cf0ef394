"""grpc.health.v1 with the standard client."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from deployments.gateway.grpc.health import Health
from tests.unit.deployments.gateway.grpc.grpc_server import MODEL, ScriptedDoor, refused, run, served

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", MODEL, "deepsplit.v1.Inference", "inference.GRPCInferenceService"])
def test_check_follows_readiness(service: str) -> None:
    async def test() -> None:
        door = ScriptedDoor()
        async with served(door) as channel:
            request = HealthCheckRequest(service=service)
            assert (await HealthStub(channel).Check(request)).status == SERVING
            door.is_ready = False
            assert (await HealthStub(channel).Check(request)).status == NOT_SERVING

    run(test())


def test_an_unknown_name() -> None:
    async def test() -> None:
        async with served(ScriptedDoor()) as channel:
            request = HealthCheckRequest(service="other")
            assert (await refused(HealthStub(channel).Check(request))).code() is grpc.StatusCode.NOT_FOUND
            watch = HealthStub(channel).Watch(request)
            assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN

    run(test())


def test_watch_tells_of_each_change_once() -> None:
    async def test() -> None:
        door = ScriptedDoor(is_ready=False)
        async with served(door) as channel:
            watches = [HealthStub(channel).Watch(HealthCheckRequest(service=name)) for name in ("", MODEL)]
            for status in (NOT_SERVING, SERVING, NOT_SERVING):
                door.is_ready = status == SERVING
                for watch in watches:
                    assert (await watch.read()).status == status

    run(test())


def test_a_watcher_that_is_being_told_something_else_still_hears_of_the_end() -> None:
    async def test() -> None:
        health = Health(lambda: {MODEL: True}, frozenset({""}), 60)
        watch = health.Watch(HealthCheckRequest(), None)
        told = [(await anext(watch)).status]
        health.close()  # while that is being written
        told += [answer.status async for answer in watch]
        assert told == [SERVING, NOT_SERVING]

    run(test())
