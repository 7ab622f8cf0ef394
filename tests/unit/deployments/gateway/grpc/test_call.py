"""What a call carries to the door and how it ends: metadata, deadlines, cancellation, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from cluster.errors import Draining, Overloaded, RateLimits, StreamLost, Unauthenticated
from deployments.gateway.door import Answer, Call
from deployments.gateway.grpc.call import event_data
from deployments.gateway.grpc.server import GrpcServer
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.unit.deployments.gateway.grpc.grpc_server import (
    MODEL,
    ScriptedDoor,
    answering,
    gateway_config,
    refused,
    run,
    served,
    status_of,
    streaming,
    token,
    trailing,
)

PROMPT = pb.CompletionRequest(text="once")


def test_metadata_and_deadline_reach_the_door() -> None:
    async def test() -> None:
        door = answering(token("a"))
        metadata = (
            ("authorization", "Bearer k1"), ("x-request-id", "r" * 500), ("x-deepsplit-priority", "batch"),
            ("x-deepsplit-ttft-s", "2.5"),
        )  # fmt: skip
        async with served(door) as channel:
            await InferenceStub(channel).Complete(PROMPT, metadata=metadata, timeout=30)
            await InferenceStub(channel).Complete(PROMPT, metadata=(("x-api-key", "k2"), ("authorization", "Basic x")))
        first, second = door.calls
        assert (first.key, first.priority, first.ttft_s, len(first.request_id)) == ("k1", "batch", 2.5, 128)
        assert first.timeout_s is not None
        assert 0 < first.timeout_s < 31  # on the wire gRPC rounds the deadline up
        assert (second.key, second.priority, second.ttft_s, second.timeout_s) == ("k2", None, None, None)
        assert len(second.request_id) == 32

    run(test())


# --- cancellation and deadlines ---


def test_cancelling_aborts_the_generation() -> None:
    async def test() -> None:
        door = streaming(token("a"), hold=True)
        async with served(door) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            call.cancel()
            await asyncio.wait_for(door.closed.wait(), 10)

    run(test())


def test_cancelling_a_unary_call_aborts_too() -> None:
    async def test() -> None:
        door = ScriptedDoor([b"{"], hold=True)
        async with served(door) as channel:
            call = InferenceStub(channel).Complete(PROMPT)
            waiting = asyncio.ensure_future(call)
            await asyncio.wait_for(door.entered.wait(), 10)
            call.cancel()
            await asyncio.wait_for(door.closed.wait(), 10)
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(test())


def test_a_lost_connection_aborts() -> None:
    async def test() -> None:
        door = streaming(token("a"), hold=True)
        async with served(door) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await channel.close(None)
            await asyncio.wait_for(door.closed.wait(), 10)

    run(test())


def test_a_deadline_that_passes_aborts() -> None:
    async def test() -> None:
        door = streaming(token("a"), hold=True)
        async with served(door) as channel:
            error = await refused(InferenceStub(channel).CompleteStream(PROMPT, timeout=0.5))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(door.closed.wait(), 10)

    run(test())


def test_stopping_ends_what_still_runs() -> None:
    async def test() -> None:
        door = streaming(token("a"), hold=True)
        server = GrpcServer(gateway_config(), MODEL, door)
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await server.stop(0.1)
            await asyncio.wait_for(door.closed.wait(), 10)
            assert (await refused(call)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    run(test())


# --- errors ---


def test_a_refusal_carries_pushback_and_budgets() -> None:
    async def test() -> None:
        limits = RateLimits(limit_tokens=100, remaining_tokens=3, reset_tokens_s=2)
        door = ScriptedDoor(
            error=Overloaded("too busy", retry_after_s=1.5, plane="experts", reason="ttft", limits=limits)
        )
        async with served(door) as channel:
            call = InferenceStub(channel).ChatStream(pb.ChatRequest(), metadata=(("x-request-id", "q"),))
            error = await refused(call)
        assert status_of(error) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too busy")
        seen = trailing(error)
        assert isinstance(seen.pop("grpc-status-details-bin"), bytes)
        assert seen == {
            "grpc-retry-pushback-ms": "1500", "x-deepsplit-plane": "experts", "x-deepsplit-reason": "ttft",
            "x-request-id": "q", "x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "3",
            "x-ratelimit-reset-tokens": "2.0s",
        }  # fmt: skip

    run(test())


def test_grpcs_own_retries_keep_to_the_pushback() -> None:
    policy = {
        "maxAttempts": 2, "initialBackoff": "60s", "maxBackoff": "60s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }  # fmt: skip
    service = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})

    class Once(ScriptedDoor):
        async def answer(self, call: Call) -> Answer:
            if not self.calls:
                self.calls.append(call)
                raise Overloaded("busy", retry_after_s=0.05, plane="attention", reason="ttft")
            return await super().answer(call)

    async def test() -> None:
        scripted = answering(token("a"))
        door = Once(scripted.chunks)
        async with served(door, options=[("grpc.service_config", service)]) as channel:
            # Its own backoff would take longer than the deadline.
            assert (await InferenceStub(channel).Complete(PROMPT, timeout=20)).choices[0].text == "a"
        assert len(door.calls) == 2

    run(test())


def test_draining_is_unavailable() -> None:
    async def test() -> None:
        door = ScriptedDoor(error=Draining("bye", retry_after_s=2, plane="gateway", reason="draining"))
        async with served(door) as channel:
            error = await refused(InferenceStub(channel).Complete(PROMPT))
        assert status_of(error) == (grpc.StatusCode.UNAVAILABLE, "bye")
        assert trailing(error)["grpc-retry-pushback-ms"] == "2000"

    run(test())


def test_unauthenticated() -> None:
    async def test() -> None:
        async with served(ScriptedDoor(error=Unauthenticated("no such key"))) as channel:
            error = await refused(InferenceStub(channel).ListModels(pb.ListModelsRequest()))
        assert status_of(error) == (grpc.StatusCode.UNAUTHENTICATED, "no such key")

    run(test())


def test_vllms_own_refusal() -> None:
    async def test() -> None:
        error = {"message": "temperature must be >= 0", "type": "BadRequestError", "code": 400}
        door = answering({"error": error}, 400)
        async with served(door) as channel:
            for call in (InferenceStub(channel).Complete(PROMPT), InferenceStub(channel).CompleteStream(PROMPT)):
                assert status_of(await refused(call)) == (
                    grpc.StatusCode.INVALID_ARGUMENT, "temperature must be >= 0",
                )  # fmt: skip
        assert door.closed.is_set()

    run(test())


def test_a_stream_that_breaks_keeps_its_tokens_and_ends_with_the_error() -> None:
    async def test() -> None:
        async with served(streaming(token("a"), error=StreamLost("the replica died"))) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            assert (await call.read()).choices[0].text == "a"
            assert status_of(await refused(call)) == (grpc.StatusCode.ABORTED, "the replica died")

    run(test())


def test_vllms_error_within_a_stream() -> None:
    async def test() -> None:
        event = {"error": {"message": "engine died", "code": 500}}
        async with served(streaming(token("a"), event)) as channel:
            assert status_of(await refused(InferenceStub(channel).CompleteStream(PROMPT))) == (
                grpc.StatusCode.INTERNAL, "engine died",
            )  # fmt: skip

    run(test())


def test_a_fault_of_ours_says_nothing_of_itself() -> None:
    async def test() -> None:
        async with served(answering({"choices": "secret"})) as channel:
            assert status_of(await refused(InferenceStub(channel).Complete(PROMPT))) == (
                grpc.StatusCode.INTERNAL, "internal error of the gateway",
            )  # fmt: skip

    run(test())


@pytest.mark.parametrize(
    ("metadata", "timeout", "code"),
    [
        ((("x-deepsplit-ttft-s", "soon"),), None, grpc.StatusCode.INVALID_ARGUMENT),
        ((("x-deepsplit-ttft-s", "-1"),), None, grpc.StatusCode.INVALID_ARGUMENT),
        ((), -1.0, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_calls_that_cannot_begin(
    metadata: tuple[tuple[str, str], ...], timeout: float | None, code: grpc.StatusCode
) -> None:
    async def test() -> None:
        door = answering(token("a"))
        async with served(door) as channel:
            error = await refused(InferenceStub(channel).Complete(PROMPT, metadata=metadata, timeout=timeout))
        assert (error.code(), door.calls) == (code, [])

    run(test())


@pytest.mark.parametrize(
    "request_",
    [
        pb.CompletionRequest(),
        pb.CompletionRequest(text="a", sampling=pb.Sampling(temperature=float("nan"))),
        pb.CompletionRequest(text="a", extra=Struct(fields={"stream": {"bool_value": True}})),
    ],
)
def test_requests_that_say_nothing_valid(request_: pb.CompletionRequest) -> None:
    async def test() -> None:
        door = answering(token("a"))
        async with served(door) as channel:
            error = await refused(InferenceStub(channel).Complete(request_))
        assert (error.code(), door.calls) == (grpc.StatusCode.INVALID_ARGUMENT, [])

    run(test())


# --- server-sent events ---


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_however_they_are_cut(size: int) -> None:
    wire = b': keep-alive\n\ndata: {"a": 1}\n\ndata:{"b": 2}\n\nevent: x\ndata: 3\n\ndata: [DONE]\n\ndata: late\n\n'

    async def chunks() -> AsyncGenerator[bytes, None]:
        for place in range(0, len(wire), size):
            yield wire[place : place + size]

    async def collect() -> list[bytes]:
        return [data async for data in event_data(chunks())]

    assert asyncio.run(collect()) == [b'{"a": 1}', b'{"b": 2}', b"3"]
