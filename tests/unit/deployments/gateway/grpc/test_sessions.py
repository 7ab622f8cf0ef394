"""Calls that bring one request after another (ModelStreamInfer): quiet, many, half-closed, cancelled, draining."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from deployments.protos.inference import open_inference_pb2 as pb
from deployments.protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub as Stub
from tests.unit.deployments.gateway.grpc.grpc_server import (
    MODEL,
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

Call = grpc.aio.StreamStreamCall
CHECK, SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


def infer(id_: str = "q1", prompt: bytes = b"p") -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(bytes_contents=[prompt])
    text = pb.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1], contents=contents)
    return pb.ModelInferRequest(model_name=MODEL, id=id_, inputs=[text])


async def opened(channel: grpc.aio.Channel, count: int, whose: str) -> list[Call]:
    """Quiet calls, each after the one before it is known to the server."""
    calls = []
    for _ in range(count):
        call = Stub(channel).ModelStreamInfer(metadata=key(whose))
        await call.write(infer())
        while (answer := await call.read()).infer_response.parameters["finish_reason"].string_param != "stop":
            assert not answer.error_message
        calls.append(call)
    return calls


async def until_quiet(world: World, count: int) -> None:
    async with asyncio.timeout(10):
        while len(world.pipeline.open_requests._quiet) != count:
            await asyncio.sleep(0.01)


def test_quiet_calls_of_one_key_keep_nobody_out(tmp_path: Path) -> None:
    """Neither at the bound of memory nor at that of requests: the oldest give way, each with a word why."""

    async def test(**bound: object) -> None:
        world = World(streaming(token("a", "stop")), gateway_config(**bound), keys_file(tmp_path, idle="", other=""))
        async with served(world) as channel:
            idle = await opened(channel, 4, "idle")
            await until_quiet(world, 4)
            (busy,) = await opened(channel, 1, "other")
            assert await channel.unary_unary(CHECK)(b"") == SERVING
            assert (await Stub(channel).ServerReady(pb.ServerReadyRequest())).ready
            error = await refused(idle[0])
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "others needed its place" in error.details()
            assert trailing(error)["x-deepsplit-plane"] == "gateway"
            world.replicas.chunks, world.replicas.content_type = answering(token("b")).chunks, "application/json"
            for _ in range(3):
                answer = await Stub(channel).ModelInfer(infer(), metadata=key("other"))
                assert answer.outputs[0].contents.bytes_contents[0] == b"b"
            for one in (*idle[1:], busy):
                one.cancel()
            await until_quiet(world, 0)

    run(test(max_bodies_mib=32, max_body_mib=8))
    run(test(max_streams=4))


def test_a_quiet_call_ends_after_its_time(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(streaming(token("a", "stop")), gateway_config(stream_idle_timeout_s=0.3))
        async with served(world) as channel:
            call = Stub(channel).ModelStreamInfer()
            for number in range(3):  # each request begins the time anew
                await asyncio.sleep(0.15)
                await call.write(infer(str(number)))
                assert (await call.read()).infer_response.id == str(number)
            code, message = status_of(await refused(call))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "gateway.stream_idle_timeout_s) did not arrive within 0.3 s" in message

    run(test())


def test_a_long_answer_is_not_quiet() -> None:
    """Neither the idle time nor somebody else's need ends it."""

    async def test() -> None:
        world = World(streaming(token("a"), hold=True), gateway_config(stream_idle_timeout_s=0.2, max_streams=1))
        async with served(world) as channel:
            call = Stub(channel).ModelStreamInfer()
            await call.write(infer())
            await call.read()
            await asyncio.sleep(0.4)
            error = await refused(Stub(channel).ModelInfer(infer()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "gateway.max_streams" in error.details()
            assert not call.done()
            call.cancel()
            await world.until_idle()

    run(test())


def test_old_calls_end_when_they_are_quiet() -> None:
    async def test() -> None:
        world = World(streaming(token("a", "stop")), gateway_config(connection_max_age_s=0.3))
        async with served(world) as channel:
            call = Stub(channel).ModelStreamInfer()
            async with asyncio.timeout(10):
                while not call.done():
                    await call.write(infer())
                    if await call.read() is grpc.aio.EOF:
                        break
                    await asyncio.sleep(0.05)
            code, message = await call.code(), await call.details()
        assert (code, "older than gateway.connection_max_age_s" in message) == (grpc.StatusCode.UNAVAILABLE, True)

    run(test())


def test_half_closed_and_cancelled_calls_leave_nothing() -> None:
    async def test() -> None:
        world = World(streaming(token("a"), hold=True), gateway_config())
        async with served(world) as channel:
            half_closed, cancelled = (Stub(channel).ModelStreamInfer() for _ in range(2))
            for call in (half_closed, cancelled):
                await call.write(infer())
                await call.read()
            await half_closed.done_writing()
            assert world.replicas.open == 2  # its answer goes on
            half_closed.cancel()
            cancelled.cancel()
            await world.until_idle()
            assert world.requests("cancelled") == 2
            quiet = Stub(channel).ModelStreamInfer()
            await quiet.done_writing()
            assert await quiet.code() is grpc.StatusCode.OK
        assert not world.pipeline.open_requests._sessions

    run(test())


def test_calls_count_against_their_tenant(tmp_path: Path) -> None:
    async def test() -> None:
        keys = keys_file(tmp_path, small="max_streams: 2", other="")
        world = World(streaming(token("a", "stop")), gateway_config(), keys)
        async with served(world) as channel:
            first, second = await opened(channel, 2, "small")
            error = await refused(Stub(channel).ModelStreamInfer(metadata=key("small")))
            assert (error.code(), trailing(error)["x-deepsplit-plane"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
            assert world.requests("quota") == 1
            await opened(channel, 1, "other")
            first.cancel()
            async with asyncio.timeout(10):
                while True:
                    call = Stub(channel).ModelStreamInfer(metadata=key("small"))
                    await call.done_writing()
                    if await call.code() is grpc.StatusCode.OK:
                        break
            second.cancel()

    run(test())


def test_a_stranger_opens_none(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(Replicas(), gateway_config(), keys_file(tmp_path, a=""))
        async with served(world) as channel:
            for _ in range(3):
                error = await refused(Stub(channel).ModelStreamInfer(metadata=key("stranger")))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert world.requests("unauthenticated") == 3
            assert not world.pipeline.open_requests._sessions

    run(test())


def test_a_draining_gateway_ends_quiet_calls_at_once_and_busy_ones_after_their_answer() -> None:
    async def test() -> None:
        world = World(streaming(token("a"), hold=True), gateway_config())
        async with served(world) as channel:
            quiet, busy = (Stub(channel).ModelStreamInfer() for _ in range(2))
            await busy.write(infer())
            await busy.read()
            await busy.write(infer("next"))
            await until_quiet(world, 1)
            draining = asyncio.create_task(world.pipeline.open_requests.drain(1.0))
            code, message = status_of(await refused(quiet))
            assert (code, "stopping" in message) == (grpc.StatusCode.UNAVAILABLE, True)
            assert not draining.done()
            assert (await refused(Stub(channel).ModelStreamInfer())).code() is grpc.StatusCode.UNAVAILABLE
            told = await busy.read()  # when the grace is over; the next request is not taken any more
            assert "was not done within 1 s" in told.error_message
            assert (await refused(busy)).code() is grpc.StatusCode.UNAVAILABLE
            await draining
        assert len(world.replicas.asked) == 1

    run(test())


@pytest.mark.parametrize("streamed", [True, False])
def test_what_the_engine_refuses_is_told_alike_streamed_or_not(streamed: bool) -> None:
    async def test() -> None:
        error = {"error": {"message": "bad regex", "type": "BadRequestError", "code": 400}}
        world = World(streaming(error) if streamed else answering(error, 400), gateway_config())
        async with served(world) as channel:
            answers = [one async for one in Stub(channel).ModelStreamInfer(iter([infer("q1"), infer("q2")]))]
        assert [one.error_message for one in answers] == ["bad regex"] * 2
        assert [one.infer_response.id for one in answers] == ["q1", "q2"]
        assert world.requests("client_error") == 2

    run(test())


def test_ids_and_traces_of_messages_reach_the_replica_cleaned() -> None:
    async def test() -> None:
        world = World(streaming(token("a", "stop")), gateway_config())
        async with served(world) as channel:
            trace = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
            ids = ["mine", "r" * 5000, "two\nlines", "", "é"]
            call = Stub(channel).ModelStreamInfer(iter([infer(one) for one in ids]), metadata=(trace,))
            assert [one.infer_response.id async for one in call] == ids  # the protocol's own field, as it came
        seen = [one.headers["x-request-id"] for one in world.replicas.asked]
        assert seen[:2] == ["mine", "r" * 128]
        assert all(len(one) == 32 and one.isalnum() for one in seen[2:])
        assert {one.headers["traceparent"] for one in world.replicas.asked} == {trace[1]}

    run(test())
