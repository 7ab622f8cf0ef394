"""Wrong bytes and slow clients at the gRPC server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor

from deployments.gateway.grpc.interceptor import SIDE_STREAMS, Interceptor
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from deployments.protos.inference import open_inference_pb2 as oip
from tests.unit.deployments.gateway.grpc.grpc_server import (
    Replicas,
    World,
    answering,
    gateway_config,
    keys_file,
    refused,
    run,
    served,
    status_of,
    trailing,
)

SERVING = b"\x08\x01"
COMPLETE, STREAM_INFER = "/deepsplit.v1.Inference/Complete", "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x12\x01\xff",  # text that is not UTF-8
        b"\x12\x7fab",  # cut short
        b"\xff" * 32,
        b"\x0a\x01\xc3",  # a name that is not UTF-8
    ],
)
def test_bytes_that_are_no_message(raw: bytes) -> None:
    async def test() -> None:
        replicas = answering({})
        async with served(replicas) as channel:
            code, message = status_of(await refused(channel.unary_unary(COMPLETE)(raw)))
        assert (code, replicas.asked) == (grpc.StatusCode.INVALID_ARGUMENT, [])
        assert "not a valid message" in message

    run(test())


def test_unknown_fields_are_passed_over() -> None:
    async def test() -> None:
        async with served(answering({"choices": [{"index": 0, "text": "a"}]})) as channel:
            raw = pb.CompletionRequest(text="a").SerializeToString() + b"\xfa\x3e\x01x"  # field 999
            assert pb.CompletionResponse.FromString(await channel.unary_unary(COMPLETE)(raw)).choices[0].text == "a"

    run(test())


def test_a_stream_of_requests_that_breaks() -> None:
    async def test() -> None:
        async with served(answering({})) as channel:
            call = channel.stream_stream(STREAM_INFER)(iter([b"\xff" * 8]))
            assert (await refused(call)).code() is grpc.StatusCode.INVALID_ARGUMENT

    run(test())


def test_an_unknown_method() -> None:
    async def test() -> None:
        async with served(answering({})) as channel:
            error = await refused(channel.unary_unary("/deepsplit.v1.Inference/Nothing")(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    run(test())


def test_a_request_that_never_comes() -> None:
    async def test() -> None:
        async with served(answering({}), read_timeout_s=0.2) as channel:
            call = channel.stream_unary(COMPLETE)()  # opened, nothing written
            assert status_of(await refused(call)) == (
                grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive within 0.2 s",
            )  # fmt: skip

    run(test())


@pytest.mark.parametrize(
    "service",
    [pb.DESCRIPTOR.services_by_name["Inference"], oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]],
    ids=lambda service: service.name,
)
def test_a_strangers_message_is_not_waited_for(service: ServiceDescriptor, tmp_path: Path) -> None:
    """Whatever reaches a replica asks for the key first: here nothing is ever sent but the call itself."""

    async def test() -> None:
        replicas = Replicas()
        async with served(World(replicas, gateway_config(), keys_file(tmp_path, a=""))) as channel:
            for method in service.methods:
                if method.name.startswith("Server") or method.name in ("ModelReady", "ModelMetadata"):
                    continue
                call = channel.stream_stream(f"/{service.full_name}/{method.name}")(metadata=(("x-api-key", "other"),))
                error = await asyncio.wait_for(refused(call), 20)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert trailing(error)["x-request-id"]
        assert replicas.asked == []

    run(test())


def test_watches_leave_room_for_requests_and_probes() -> None:
    async def test() -> None:
        watch, check = (f"/grpc.health.v1.Health/{name}" for name in ("Watch", "Check"))
        async with served(answering({"choices": [{"index": 0, "text": "a"}]})) as channel:
            watches = [channel.unary_stream(watch)(b"") for _ in range(SIDE_STREAMS)]
            for one in watches:
                await one.read()
            error = await refused(channel.unary_stream(watch)(b""))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(trailing(error)["grpc-retry-pushback-ms"]) > 0
            assert await channel.unary_unary(check)(b"") == SERVING
            assert await channel.unary_unary(COMPLETE)(pb.CompletionRequest(text="a").SerializeToString())
            watches[0].cancel()
            async with asyncio.timeout(10):
                while await channel.unary_stream(watch)(b"").read() is grpc.aio.EOF:
                    await asyncio.sleep(0.01)

    run(test())


def test_a_call_without_a_request() -> None:
    async def test() -> None:
        async with served(answering({})) as channel:
            call = channel.stream_unary(COMPLETE)(iter([]))
            assert status_of(await refused(call)) == (
                grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request message",
            )  # fmt: skip

    run(test())


def test_a_client_that_reads_nothing_frees_its_generation_and_blocks_nobody() -> None:
    async def test() -> None:
        text = json.dumps({"choices": [{"index": 0, "text": "a" * 2**16}]}).encode()
        replicas = Replicas([b"data: " + text + b"\n\n"] * 4096, content_type="text/event-stream")
        async with served(World(replicas, gateway_config(write_stall_s=0.2))) as channel:
            stalled = InferenceStub(channel).CompleteStream(pb.CompletionRequest(text="a"))
            await stalled.initial_metadata()
            await asyncio.wait_for(replicas.closed.wait(), 20)
            assert replicas.sent < 4096
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert oip.ServerLiveResponse.FromString(await live(b"")).live

    run(test())


def test_a_handler_is_closed_with_its_call_even_if_something_holds_it() -> None:
    async def test() -> None:
        closed = asyncio.Event()
        held: list[AsyncGenerator[pb.CompletionChunk, None]] = []

        async def tokens() -> AsyncGenerator[pb.CompletionChunk, None]:
            try:
                while True:
                    yield pb.CompletionChunk(id="a" * 2**16)
            finally:
                closed.set()

        def behaviour(request: bytes, context: grpc.aio.ServicerContext) -> AsyncGenerator[pb.CompletionChunk, None]:
            held.append(tokens())
            return held[0]

        pipeline = World(Replicas(), gateway_config()).pipeline
        server = grpc.aio.server(interceptors=[Interceptor(pipeline, gateway_config())])
        handler = grpc.unary_stream_rpc_method_handler(behaviour, bytes, pb.CompletionChunk.SerializeToString)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t", {"tokens": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream("/t/tokens")(b"")
            await call.read()
            call.cancel()
            await asyncio.wait_for(closed.wait(), 10)
        await server.stop(0)

    run(test())
