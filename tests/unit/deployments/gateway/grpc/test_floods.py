"""Many clients that are slow, silent or strangers: everybody else is served, and memory stays bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from deployments.gateway.grpc.interceptor import SIDE_CALLS
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.unit.deployments.gateway.grpc.grpc_server import (
    Replicas,
    World,
    answering,
    client,
    gateway_config,
    key,
    keys_file,
    refused,
    run,
    served,
    token,
    trailing,
)
from tests.unit.deployments.gateway.grpc.raw_client import FIRST_WINDOW, RawClient, message

COMPLETE, LIST = "/deepsplit.v1.Inference/Complete", "/deepsplit.v1.Inference/ListModels"
CHECK, SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"
PROMPT = pb.CompletionRequest(text="once")
MIB = 2**20


def two_tenants(folder: Path, **settings: object) -> World:
    return World(answering(token("a")), gateway_config(**settings), keys_file(folder, flood="", other=""))


async def is_served(channel: grpc.aio.Channel, within_s: float) -> None:
    """Another tenant, and probes."""
    assert await channel.unary_unary(CHECK)(b"", timeout=within_s) == SERVING
    answer = await InferenceStub(channel).Complete(PROMPT, metadata=key("other"), timeout=within_s)
    assert answer.choices[0].text == "a"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_no_more_messages_are_received_at_once_than_fit_the_bound() -> None:
    """The server opens a call's window beyond the first 64 KiB only when it is that message's turn."""

    async def test() -> None:
        server = (world := World(answering(token("a")), gateway_config(max_body_mib=8, max_bodies_mib=16))).server()
        port = await server.start()
        async with RawClient(port) as raw:
            streams = [await raw.call(COMPLETE, message(b"\x12", 7 * MIB)) for _ in range(20)]
            await until(lambda: len(raw.opened) > 2)
            assert (raw.first_window, {stream for stream in streams if raw.opened[stream]}) == (FIRST_WINDOW, {1, 3})
        await server.stop(0)
        assert world.idle

    run(test())


def test_bodies_are_held_up_to_the_bound_of_all_together() -> None:
    async def test() -> None:
        replicas = Replicas([b"{"], hold=True)
        config = gateway_config(max_body_mib=1, max_bodies_mib=2)
        async with served(world := World(replicas, config)) as channel:
            request = pb.CompletionRequest(text="a", sampling=pb.Sampling(stop=["s" * (MIB - 100)]))
            calls = [InferenceStub(channel).Complete(request) for _ in "ab"]
            await until(lambda: world.pipeline._memory.held_bytes > 1.9 * MIB)
            error = await refused(InferenceStub(channel).Complete(request))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "gateway.max_bodies_mib" in error.details()
            assert trailing(error)["x-deepsplit-reason"] == "bodies"
            for call in calls:
                call.cancel()
            await until(lambda: world.pipeline._memory.held_bytes == 0)

    run(test())


def test_requests_whose_message_never_comes_keep_nobody_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(two_tenants(tmp_path, max_body_mib=8, max_bodies_mib=16), read_timeout_s=30) as channel:
            silent = [channel.stream_unary(COMPLETE)(metadata=key("flood")) for _ in range(50)]
            await asyncio.sleep(0.1)
            await is_served(channel, within_s=3)
            assert sum(call.done() for call in silent) < 10, "they have their time, too"
            for call in silent:
                call.cancel()

    run(test())


def test_a_flood_of_strangers(tmp_path: Path) -> None:
    async def test() -> None:
        server = (world := two_tenants(tmp_path, max_streams=8)).server()
        port = await server.start()
        async with client(port) as channel, client(port) as first, client(port) as second, client(port) as third:
            calls = (one.stream_unary(COMPLETE) for one in (first, second, third) for _ in range(200))
            strangers = [call(metadata=key("stranger")) for call in calls]
            await is_served(channel, within_s=5)
            codes = {(await refused(call)).code() for call in strangers}
            assert (codes, world.requests("unauthenticated")) == ({grpc.StatusCode.UNAUTHENTICATED}, 600)
        await server.stop(0)

    run(test())


def test_probes_whose_message_never_comes_keep_no_probe_out(tmp_path: Path) -> None:
    async def test() -> None:
        world = two_tenants(tmp_path)
        server = world.server()
        port = await server.start()
        async with client(port) as silent, client(port) as channel:
            calls = [silent.stream_unary(CHECK)() for _ in range(SIDE_CALLS - 10)]
            for _ in range(20):
                await is_served(channel, within_s=1)
                calls.append(silent.stream_unary(CHECK)())
            for call in calls:
                call.cancel()
        await server.stop(0)

    run(test())


@pytest.mark.parametrize("method", [CHECK, LIST])
def test_clients_that_take_no_answer_keep_nobody_out(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More such calls than there may be at once: each is given up after a while, though its client stays connected."""

    async def test() -> None:
        server = (world := two_tenants(tmp_path, max_streams=250, write_stall_s=0.2)).server()
        port = await server.start()
        interceptor = server._interceptor
        async with AsyncExitStack() as stack:
            for _ in range(3):
                raw = await stack.enter_async_context(RawClient(port, own_window=0))
                for _ in range(200):
                    await raw.call(method, message(b""), ("x-api-key", "ds-flood"), end=True)
                await until(lambda: len(world.pipeline.open_requests) + interceptor._side_calls > 0)
                await until(lambda: len(world.pipeline.open_requests) + interceptor._side_calls == 0)
                assert raw.ended == set()
            async with client(port) as channel:
                await is_served(channel, within_s=5)
        await server.stop(0)
        assert world.idle

    run(test())
    assert [one for one in caplog.records if one.name != "asyncio"] == []  # where gRPC's poller logs what it skips
