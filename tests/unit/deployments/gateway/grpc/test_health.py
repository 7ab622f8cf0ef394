"""grpc.health.v1 with the standard client."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from deployments.gateway.grpc.health import Health
from tests.unit.deployments.gateway.grpc.grpc_server import MODEL, Replicas, refused, run, served

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("service", ["", MODEL, "alias", "deepsplit.v1.Inference", "inference.GRPCInferenceService"])
def test_check_follows_readiness(service: str) -> None:
    async def test() -> None:
        replicas = Replicas()
        async with served(replicas) as channel:
            request = HealthCheckRequest(service=service)
            assert (await HealthStub(channel).Check(request)).status == SERVING
            replicas.names = ""
            assert (await HealthStub(channel).Check(request)).status == NOT_SERVING

    run(test())


def test_all_names() -> None:
    async def test() -> None:
        async with served(Replicas()) as channel:
            listed = (await HealthStub(channel).List(HealthListRequest())).statuses
        names = {"", MODEL, "alias", "deepsplit.v1.Inference", "inference.GRPCInferenceService"}
        assert {name: listed[name].status for name in listed} == dict.fromkeys(names, SERVING)

    run(test())


def test_an_unknown_name() -> None:
    async def test() -> None:
        async with served(Replicas()) as channel:
            request = HealthCheckRequest(service="other")
            assert (await refused(HealthStub(channel).Check(request))).code() is grpc.StatusCode.NOT_FOUND
            watch = HealthStub(channel).Watch(request)
            assert (await watch.read()).status == HealthCheckResponse.SERVICE_UNKNOWN

    run(test())


def test_watch_tells_of_each_change_once() -> None:
    async def test() -> None:
        replicas = Replicas(names="")
        async with served(replicas) as channel:
            watches = [HealthStub(channel).Watch(HealthCheckRequest(service=name)) for name in ("", MODEL)]
            for status in (NOT_SERVING, SERVING, NOT_SERVING):
                replicas.names = "a" if status == SERVING else ""
                for watch in watches:
                    assert (await watch.read()).status == status

    run(test())


def test_a_watcher_that_is_being_told_something_else_still_hears_of_the_end() -> None:
    async def test() -> None:
        health = Health(lambda: {MODEL: True}, frozenset({""}), 60)
        watch = health.Watch(HealthCheckRequest(), None)
        told = [(await anext(watch)).status]
        closing = asyncio.create_task(health.close())  # while that is being written
        await asyncio.sleep(0)
        told += [answer.status async for answer in watch]
        assert told == [SERVING, NOT_SERVING]
        await closing

    run(test())
