"""Streams that have nothing to say: comments keep their connections, and errors after one keep their shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import Message

from cluster.errors import DeepsplitError, Overloaded, Plane, Reason, ReplicaLost, StreamLost
from deployments.directory.members import ResponseHead
from deployments.gateway.pipeline import Answer
from deployments.gateway.rest.writer import AnswerWriter
from tests.unit.deployments.gateway.gateway_world import (
    CHAT,
    COMPLETIONS,
    JSON,
    SSE,
    FakePool,
    event,
    run,
    stream,
    text_of,
)
from tests.unit.deployments.gateway.rest.rest_world import REPLY, RestWorld, body_of, call

COMMENT = b": waiting\n\n"
PATHS = (COMPLETIONS, CHAT, "/v1/responses", "/v1/messages")
BUSY = Overloaded("busy", retry_after_s=1.2, plane=Plane.EXPERTS, reason=Reason.TTFT)
EVERY_S = 0.02


def status_of(sent: list[Message]) -> int:
    (start,) = (message for message in sent if message["type"] == "http.response.start")
    assert sent[0] is start
    return int(start["status"])


def body_sent(sent: list[Message]) -> bytes:
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    return b"".join(message["body"] for message in sent[1:])


async def ask(world: RestWorld, path: str, quiet_s: float, **fields: object) -> tuple[int, bytes]:
    """Status and body of a request whose replica says nothing more, after its first item, for a while."""
    pool = world.pool
    pool.hold = asyncio.Event()
    calling = asyncio.create_task(call(world, path, body_of(path, {"stream": True, **fields})))
    await pool.sending.wait()
    await asyncio.sleep(quiet_s)
    pool.hold.set()
    sent = await calling
    assert world.nothing_left()
    return status_of(sent), body_sent(sent)


def last_event(path: str, body: bytes) -> dict:
    """The error that ends a stream after comments, in the path's shape: message and type."""
    comments, _, last = body.rpartition(COMMENT)
    assert set(comments.split(b"\n\n")) <= {COMMENT.strip(), b""}
    name, _, data = last.rpartition(b"data: ")
    assert name == (b"event: error\n" if path in ("/v1/responses", "/v1/messages") else b"")
    told = json.loads(data)
    assert b"[DONE]" not in body
    if path == "/v1/responses":
        assert told["type"] == "error"
        return told
    assert path != "/v1/messages" or told["type"] == "error"
    return told["error"]


def test_a_stream_that_prefills_says_so_and_then_goes_on() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([SSE, *stream("wxyz")]), sse_comment_interval_s=EVERY_S)
        status, body = await ask(world, COMPLETIONS, 10 * EVERY_S)
        assert status == 200
        assert body.startswith(COMMENT)
        assert body.count(COMMENT) >= 3
        assert text_of(body) == "wxyz"
        assert body.endswith(b"data: [DONE]\n\n")

    run(scenario)


def test_a_stream_that_pauses_later_says_so_too() -> None:
    class Pauses(FakePool):
        async def send(self, *asked: object) -> AsyncGenerator[ResponseHead | bytes, None]:  # type: ignore[override]
            async for item in super().send(*asked):  # type: ignore[arg-type]
                yield item
                if isinstance(item, bytes) and b'"x"' in item:
                    await asyncio.sleep(6 * EVERY_S)

    async def scenario() -> None:
        world = RestWorld(Pauses([SSE, *stream("wxyz")]), sse_comment_interval_s=EVERY_S)
        body = body_sent(await call(world, content=body_of(COMPLETIONS, {"stream": True})))
        before, *_, after = body.split(COMMENT)
        assert (text_of(before), text_of(after)) == ("wx", "yz")

    run(scenario)


def test_a_stream_that_goes_on_sends_no_comment() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *[event(65, first=True)] * 300, *stream("z")])
        world = RestWorld(pool, sse_comment_interval_s=5.0)
        body = body_sent(await call(world, content=body_of(COMPLETIONS, {"stream": True})))
        assert COMMENT not in body

    run(scenario)


@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_is_refused_after_a_comment_ends_with_an_error_event(path: str) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, BUSY])
        status, body = await ask(RestWorld(pool, sse_comment_interval_s=EVERY_S), path, 5 * EVERY_S)
        error = last_event(path, body)
        assert (status, error["message"]) == (200, "busy")
        if path != "/v1/messages":
            assert (error["plane"], error["reason"]) == ("experts", "ttft")

    run(scenario)


@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_waits_and_is_then_refused(path: str) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("w")], names="a")
        pool.hold = asyncio.Event()
        world = RestWorld(pool, sse_comment_interval_s=EVERY_S)
        first = asyncio.create_task(call(world, content=body_of(COMPLETIONS, {"n": 4, "stream": True})))
        await pool.sending.wait()
        waits = asyncio.create_task(call(world, path, body_of(path, {"stream": True})))
        await asyncio.sleep(5 * EVERY_S)
        await world.pipeline.open_requests.drain(0)
        sent = await waits
        await first
        assert status_of(sent) == 200
        assert "stopped" in last_event(path, body_sent(sent))["message"]
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("said", ["json", "indented", "text", "list"])
@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_the_engine_refuses_after_a_comment(path: str, said: str) -> None:
    error = {"message": "logprobs is too large", "type": "BadRequestError", "param": None, "code": 400}
    told: object = {"type": "error", "error": error} if path == "/v1/messages" else {"error": error}
    body = {
        "json": json.dumps(told).encode(), "indented": json.dumps(told, indent=2).encode(),
        "text": b"logprobs is too large\n\nevent: x", "list": b"[1]",
    }[said]  # fmt: skip

    async def scenario() -> None:
        pool = FakePool([ResponseHead(400, "application/json"), body])
        status, got = await ask(RestWorld(pool, sse_comment_interval_s=EVERY_S), path, 5 * EVERY_S)
        assert status == 200
        seen = last_event(path, got)
        if "json" in said or said == "indented":
            assert seen["message"] == error["message"]
        else:
            assert seen["message"].startswith("the engine answered 400: ")
        assert got.count(b"data: ") == 1

    run(scenario)


@pytest.mark.parametrize("error", [StreamLost("cannot go on"), ReplicaLost("gone"), ZeroDivisionError("secret")])
@pytest.mark.parametrize("path", PATHS)
def test_other_ends_after_a_comment(path: str, error: Exception) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, error], [error])  # responses and messages ask the engine once more, without a stream
        world = RestWorld(pool, sse_comment_interval_s=EVERY_S, max_resends=0)
        _, body = await ask(world, path, 5 * EVERY_S)
        message = last_event(path, body)["message"]
        assert message == str(error) if isinstance(error, DeepsplitError) else "internal error" in message

    run(scenario)


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": None}])
def test_what_is_no_stream_gets_no_comment(fields: dict[str, object]) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([JSON, REPLY]), sse_comment_interval_s=EVERY_S)
        assert await ask(world, COMPLETIONS, 5 * EVERY_S, **fields) == (200, REPLY)

    run(scenario)


def test_comments_can_be_turned_off() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([SSE, BUSY]), sse_comment_interval_s=None)
        status, body = await ask(world, COMPLETIONS, 5 * EVERY_S)
        assert (status, json.loads(body)["error"]["message"]) == (429, "busy")

    run(scenario)


def test_a_refusal_before_the_first_comment_is_a_response_of_its_own() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([SSE, BUSY]), sse_comment_interval_s=10.0)
        status, body = await ask(world, COMPLETIONS, 0)
        assert (status, json.loads(body)["error"]["message"]) == (429, "busy")

    run(scenario)


@pytest.mark.parametrize("blocked_for_s", [0.0, 3 * EVERY_S])
def test_a_slow_connection_never_gets_two_heads_or_a_body_before_its_head(blocked_for_s: float) -> None:
    """Whatever is blocked when the answer comes: the comment's head, or nothing."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(blocked_for_s)
        sent.append(message)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"

    @asynccontextmanager
    async def answer(quiet_s: float) -> AsyncIterator[Answer]:
        await asyncio.sleep(quiet_s)
        yield Answer(200, "text/event-stream", {}, chunks())

    async def scenario() -> None:
        for step in range(8):
            sent.clear()
            writer = AnswerWriter(COMPLETIONS, send, EVERY_S)
            await writer.write(answer(step * EVERY_S / 2), streamed=True)
            await writer.fail(StreamLost("too late"))  # after the end nothing more is said
            assert status_of(sent) == 200
            assert body_sent(sent).replace(COMMENT, b"") == b"data: 1\n\n"

    run(scenario)
