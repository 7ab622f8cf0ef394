"""What a call carries into the pipeline and how it ends: metadata, deadlines, cancellation, errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from cluster.errors import Draining, Overloaded, Plane, RateLimits, Reason, ReplicaLost, RequestTimeout
from deployments.gateway.grpc.call import CallContext
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.unit.deployments.gateway import clocked_loop
from tests.unit.deployments.gateway.grpc.grpc_server import (
    Replicas,
    World,
    answering,
    gateway_config,
    key,
    keys_file,
    refused,
    run,
    served,
    status_of,
    streaming,
    token,
    trailing,
)

PROMPT = pb.CompletionRequest(text="once")


def test_metadata_reach_the_pipeline_and_the_replica(tmp_path: Path) -> None:
    async def test() -> None:
        replicas = answering(token("a"))
        world = World(replicas, gateway_config(), keys_file(tmp_path, k1="classes: [interactive]", k2="weight: 2"))
        trace = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        async with served(world) as channel:
            stub = InferenceStub(channel)
            await stub.Complete(PROMPT, metadata=(*key("k1"), ("x-request-id", "r" * 500), trace))
            other = (("x-api-key", "ds-k2"), ("authorization", "Basic x"), ("x-deepsplit-priority", "batch"))
            call = stub.Complete(PROMPT, metadata=(*other, ("x-request-id", "  ")))
            await call
            error = await refused(stub.Complete(PROMPT, metadata=(*key("k1"), ("x-deepsplit-priority", "batch"))))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        first, second = replicas.asked
        assert first.headers == {"x-request-id": "r" * 128, "traceparent": trace[1]}
        (made_up,) = second.headers.values()
        assert (len(made_up), dict(await call.trailing_metadata())) == (32, {"x-request-id": made_up})
        assert world.requests("ok") == 2

    run(test())


# --- cancellation and deadlines ---


def test_cancelling_aborts_the_generation() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), hold=True)
        async with served(replicas) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            call.cancel()
            await asyncio.wait_for(replicas.closed.wait(), 10)

    run(test())


def test_cancelling_a_unary_call_aborts_too() -> None:
    async def test() -> None:
        replicas = Replicas([b"{"], hold=True)
        async with served(replicas) as channel:
            call = InferenceStub(channel).Complete(PROMPT)
            waiting = asyncio.ensure_future(call)
            await asyncio.wait_for(replicas.entered.wait(), 10)
            call.cancel()
            await asyncio.wait_for(replicas.closed.wait(), 10)
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(test())


def test_cancelling_before_the_message_is_no_bad_request() -> None:
    async def test() -> None:
        world = World(answering(token("a")), gateway_config())
        async with served(world) as channel:
            for _ in range(10):
                call = channel.stream_unary("/deepsplit.v1.Inference/Complete")()
                async with asyncio.timeout(10):
                    while not len(world.pipeline.open_requests):
                        await asyncio.sleep(0.005)
                call.cancel()
                await world.until_idle()
        assert world.requests("cancelled") == 10

    run(test())


def test_a_lost_connection_aborts() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), hold=True)
        async with served(replicas) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await channel.close(None)
            await asyncio.wait_for(replicas.closed.wait(), 10)

    run(test())


def test_a_deadline_that_passes_aborts() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), hold=True)
        async with served(replicas) as channel:
            error = await refused(InferenceStub(channel).CompleteStream(PROMPT, timeout=0.5))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(replicas.closed.wait(), 10)

    run(test())


def test_stopping_ends_what_still_runs() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), hold=True)
        server = World(replicas, gateway_config()).server()
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            await call.read()
            await server.stop(0.1)
            await asyncio.wait_for(replicas.closed.wait(), 10)
            assert (await refused(call)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

    run(test())


# --- errors ---


def test_a_refusal_carries_pushback_and_budgets() -> None:
    async def test() -> None:
        limits = RateLimits(limit_tokens=100, remaining_tokens=3, reset_tokens_s=2)
        replicas = Replicas(
            error=Overloaded("too busy", retry_after_s=1.5, plane=Plane.EXPERTS, reason=Reason.TTFT, limits=limits)
        )
        async with served(replicas) as channel:
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

    async def test() -> None:
        replicas = answering(token("a"))
        chunks, replicas.chunks = replicas.chunks, ()
        replicas.error = Overloaded("busy", retry_after_s=0.05, plane=Plane.ATTENTION, reason=Reason.TTFT)

        async def recover() -> None:
            await replicas.closed.wait()
            replicas.chunks, replicas.error = chunks, None

        recovering = asyncio.create_task(recover())
        async with served(replicas, options=[("grpc.service_config", service)]) as channel:
            # Its own backoff would take longer than the deadline.
            assert (await InferenceStub(channel).Complete(PROMPT, timeout=20)).choices[0].text == "a"
        await recovering
        assert len(replicas.asked) == 2

    run(test())


def test_draining_is_unavailable() -> None:
    async def test() -> None:
        replicas = Replicas(error=Draining("bye", retry_after_s=2, plane=Plane.GATEWAY, reason=Reason.DRAINING))
        async with served(replicas) as channel:
            error = await refused(InferenceStub(channel).Complete(PROMPT))
        assert status_of(error) == (grpc.StatusCode.UNAVAILABLE, "bye")
        assert trailing(error)["grpc-retry-pushback-ms"] == "2000"

    run(test())


def test_unauthenticated(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(Replicas(), gateway_config(), keys_file(tmp_path, a=""))
        async with served(world) as channel:
            error = await refused(InferenceStub(channel).ListModels(pb.ListModelsRequest(), metadata=key("other")))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "key" in error.details()

    run(test())


REFUSAL = {"error": {"message": "logprobs must be at most 20", "type": "BadRequestError", "code": 400}}
SAID = (grpc.StatusCode.INVALID_ARGUMENT, "logprobs must be at most 20")


@pytest.mark.parametrize("replicas", [answering(REFUSAL, 400), streaming(REFUSAL)], ids=["at once", "in the stream"])
def test_what_the_engine_refuses_is_told_alike_streamed_or_not(replicas: Replicas) -> None:
    """vLLM begins some streams before it looks at the request."""

    async def test() -> None:
        world = World(replicas, gateway_config())
        async with served(world) as channel:
            stub = InferenceStub(channel)
            assert status_of(await refused(stub.CompleteStream(PROMPT))) == SAID
            assert status_of(await refused(stub.ChatStream(pb.ChatRequest()))) == SAID
            if replicas.status == 400:
                assert status_of(await refused(stub.Complete(PROMPT))) == SAID
                assert status_of(await refused(stub.Chat(pb.ChatRequest()))) == SAID
        assert world.requests("client_error") == len(replicas.asked)

    run(test())


def test_a_stream_that_breaks_keeps_its_tokens_and_ends_with_the_error() -> None:
    async def test() -> None:
        async with served(streaming(token("a"), error=ReplicaLost("it died"))) as channel:
            request = pb.CompletionRequest(text="once", sampling=pb.Sampling(seed=7, temperature=1))
            call = InferenceStub(channel).CompleteStream(request)
            assert (await call.read()).choices[0].text == "a"
            error = await refused(call)
        assert error.code() is grpc.StatusCode.ABORTED
        assert "seed" in error.details()

    run(test())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [(400, grpc.StatusCode.INVALID_ARGUMENT, "client_error"), (500, grpc.StatusCode.INTERNAL, "engine_error")],
)
def test_vllms_error_within_a_stream(begun: bool, status: int, code: grpc.StatusCode, outcome: str) -> None:
    async def test() -> None:
        event = {"error": {"message": "no such thing", "code": status}}
        world = World(streaming(*[token("a")] * begun, event), gateway_config(max_resends=0))
        async with served(world) as channel:
            error = await refused(InferenceStub(channel).CompleteStream(PROMPT))
        if begun and status == 500:  # the replica's fault: another one would go on
            assert (error.code(), world.requests("stream_lost")) == (grpc.StatusCode.ABORTED, 1)
        else:
            assert (*status_of(error), world.requests(outcome)) == (code, "no such thing", 1)

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
        replicas = answering(token("a"))
        async with served(replicas) as channel:
            error = await refused(InferenceStub(channel).Complete(PROMPT, metadata=metadata, timeout=timeout))
        assert (error.code(), replicas.asked) == (code, [])

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
        replicas = answering(token("a"))
        async with served(replicas) as channel:
            error = await refused(InferenceStub(channel).Complete(request_))
        assert (error.code(), replicas.asked) == (grpc.StatusCode.INVALID_ARGUMENT, [])

    run(test())


# --- server-sent events ---


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_however_they_are_cut(size: int) -> None:
    async def test() -> None:
        events = b"".join(streaming(token("a"), token("b", "stop")).chunks)
        wire = b": keep-alive\n\n" + events.replace(b"data: ", b"event: x\ndata:", 1) + b"data: late\n\n"
        chunks = [wire[place : place + size] for place in range(0, len(wire), size)]
        async with served(Replicas(chunks, content_type="text/event-stream")) as channel:
            chunks_ = [chunk.choices[0].text async for chunk in InferenceStub(channel).CompleteStream(PROMPT)]
        assert chunks_ == ["a", "b"]

    run(test())


# --- clients that read slowly ---


class SlowReader:
    """In place of gRPC's context: its client takes so long to read a message."""

    def __init__(self, takes_s: float) -> None:
        self._takes_s = takes_s

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: pb.CompletionChunk) -> None:
        await asyncio.sleep(self._takes_s)


@pytest.mark.parametrize(
    ("size", "takes_s", "given_up"),
    [(1, 29, False), (1, 31, True), (2**16, 31, True), (2**20, 400, False), (2**20, 600, True)],
)
def test_a_client_has_the_stall_time_for_each_64_kib_of_a_message(size: int, takes_s: float, given_up: bool) -> None:
    call = CallContext(SlowReader(takes_s), write_stall_s=30)
    writing = call.write(pb.CompletionChunk(id="a" * max(0, size - 8)))
    if given_up:
        with pytest.raises(RequestTimeout, match="did not read"):
            clocked_loop.run(writing)
    else:
        clocked_loop.run(writing)
