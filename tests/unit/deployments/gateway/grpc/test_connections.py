"""How long connections live, and where new ones go: age, draining, addresses."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from cluster.errors import StartupError
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.unit.deployments.gateway.grpc.grpc_server import (
    Replicas,
    World,
    answering,
    client,
    gateway_config,
    refused,
    run,
    streaming,
    token,
)
from tests.unit.deployments.gateway.grpc.raw_client import RawClient

PROMPT = pb.CompletionRequest(text="once")


def held_stream() -> Replicas:
    """A token, and once it is released another one and the end."""
    rest = streaming(token("b", "stop"))
    replicas = streaming(token("a"), hold=True)
    replicas.last = b"".join(rest.chunks)
    return replicas


async def goes_on(call: grpc.aio.UnaryStreamCall, replicas: Replicas) -> None:
    replicas.released.set()
    assert (await call.read()).choices[0].text == "b"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


def test_an_old_connection_is_ended_and_what_runs_on_it_is_not() -> None:
    async def test() -> None:
        world = World(replicas := held_stream(), gateway_config(connection_max_age_s=0.5))
        server = world.server()
        port = await server.start()
        async with RawClient(port) as raw, client(port) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await asyncio.wait_for(raw.goaway.wait(), 5)
            await asyncio.sleep(0.5)  # both connections are older than their age and its jitter now
            again = InferenceStub(channel).CompleteStream(PROMPT)
            assert (await again.read()).choices[0].text == "a"  # over a new connection
            await goes_on(call, replicas)
            await goes_on(again, replicas)
        await server.stop(0)
        assert world.idle

    run(test())


def test_a_draining_gateway_leaves_the_port_to_its_siblings() -> None:
    async def test() -> None:
        server = World(replicas := held_stream(), gateway_config()).server()
        port = await server.start()
        async with client(port) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            assert (await call.read()).choices[0].text == "a"
            watch = HealthStub(channel).Watch(HealthCheckRequest())
            assert (await watch.read()).status == HealthCheckResponse.SERVING
            staying = World(answering(token("b")), gateway_config(port))
            sibling = staying.server()
            assert await sibling.start() == port
            told = asyncio.create_task(watch.read())
            draining = asyncio.create_task(server.drain())
            assert (await told).status == HealthCheckResponse.NOT_SERVING
            await draining
            for _ in range(20):
                async with client(port) as fresh:
                    answer = await InferenceStub(fresh).Complete(PROMPT, wait_for_ready=True, timeout=10)
                    assert answer.choices[0].text == "b"
            # The same channel, whose connection takes no new call, finds the sibling too.
            assert (await InferenceStub(channel).Complete(PROMPT, wait_for_ready=True)).choices[0].text == "b"
            await goes_on(call, replicas)
        assert (len(replicas.asked), len(staying.replicas.asked)) == (1, 21)
        await server.stop(1)
        await sibling.stop(0)

    run(test())


def test_stopping_after_draining_waits_for_what_runs_no_longer_than_its_grace() -> None:
    async def test() -> None:
        world = World(held_stream(), gateway_config())
        server = world.server()
        port = await server.start()
        async with client(port) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await server.drain()
            await server.drain()  # twice does no harm
            async with asyncio.timeout(5):
                await server.stop(0.1)
            assert (await refused(call)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            await world.until_idle()

    run(test())


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """What the machine says `localhost` is."""

    def found(host: str, port: int, type: int) -> list[tuple[object, ...]]:
        assert host == "localhost"
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one in addresses]
        ends = [(one, port, 0, 0) if ":" in one else (one, port) for one in addresses]
        return [(family, type, 6, "", end) for family, end in zip(families, ends, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.mark.parametrize(
    ("addresses", "listening"),
    [
        (("::1", "127.0.0.1"), ("[::1]", "127.0.0.1")),
        (("127.0.0.1", "127.0.0.1"), ("127.0.0.1",)),
        (("203.0.113.1", "127.0.0.1"), ("127.0.0.1",)),  # not this machine's, as ::1 where IPv6 is off
    ],
)
def test_localhost_is_every_address_that_the_machine_has(
    addresses: tuple[str, ...], listening: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        world = World(answering(token("a")), gateway_config(host="localhost"))
        server = world.server()
        with monkeypatch.context() as patch:
            resolve(patch, *addresses)
            port = await server.start()
        for address in listening:
            async with grpc.aio.insecure_channel(f"{address}:{port}") as channel:
                assert (await InferenceStub(channel).Complete(PROMPT, timeout=10)).choices[0].text == "a"
        await server.stop(0)

    run(test())


@pytest.mark.parametrize("addresses", [("203.0.113.1",), ("203.0.113.1", "203.0.113.2")])
def test_a_name_of_which_nothing_can_be_bound(addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        resolve(monkeypatch, *addresses)
        with pytest.raises(StartupError, match=r"cannot listen on localhost:0: .*; see gateway\."):
            await World(Replicas(), gateway_config(host="localhost")).server().start()

    run(test())
