"""Clients that go away, at every moment of a request: nothing of it stays behind."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct

import pytest

from tests.unit.deployments.gateway.gateway_world import SSE, FakePool, event, run, stream
from tests.unit.deployments.gateway.rest.rest_world import ANSWER, RestWorld, body_of, call

STREAMED = body_of("/v1/completions", {"stream": True, "max_tokens": 10_000})
LONG = [SSE, event(65, first=True), *[event(66)] * 9_000]


def ended_as(world: RestWorld, outcome: str, priority: str = "interactive") -> bool:
    labels = {"outcome": outcome, "class": priority, "tenant": "anonymous"}
    return world.value("deepsplit_requests_total", **labels) == 1


@pytest.mark.parametrize("comments", [None, 0.01])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_while_its_answer_is_made_is_withdrawn(streamed: bool, comments: float | None) -> None:
    async def scenario() -> None:
        pool = FakePool(LONG if streamed else ANSWER)
        pool.hold = asyncio.Event()
        world = RestWorld(pool, sse_comment_interval_s=comments)
        leave = asyncio.Event()
        body = body_of("/v1/completions", {"stream": streamed})
        calling = asyncio.create_task(call(world, content=body, leave=leave))
        await pool.sending.wait()
        await asyncio.sleep(0.05)
        leave.set()
        await calling
        assert pool.closed == 1
        assert world.nothing_left()
        assert ended_as(world, "cancelled")

    run(scenario)


@pytest.mark.parametrize("comments", [None, 0.01])
def test_a_client_that_leaves_while_it_waits_is_withdrawn(comments: float | None) -> None:
    async def scenario() -> None:
        pool = FakePool(LONG, names="a")
        pool.hold = asyncio.Event()
        world = RestWorld(pool, sse_comment_interval_s=comments)
        first = asyncio.create_task(call(world, content=body_of("/v1/completions", {"n": 4, "stream": True})))
        await pool.sending.wait()
        leave = asyncio.Event()
        waits = asyncio.create_task(call(world, content=STREAMED, leave=leave))
        while world.room.open_tickets() < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(pool.seen) == 1, "the second one should wait"
        leave.set()
        await waits
        assert world.room.open_tickets() == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert world.nothing_left()

    run(scenario)


def test_a_client_that_leaves_while_its_body_comes() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool())
        leave = asyncio.Event()
        calling = asyncio.create_task(call(world, content=b"{" * 1000, leave=leave, whole_body=False))
        while not world.pipeline._memory.held_bytes:
            await asyncio.sleep(0.01)
        leave.set()
        assert await calling == []
        assert world.nothing_left()
        assert ended_as(world, "cancelled", "unknown")

    run(scenario)


@pytest.mark.parametrize("messages", [1, 2, 3])
def test_a_client_that_leaves_in_mid_stream_ends_the_generation(messages: int) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(LONG))
        sent = await call(world, content=STREAMED, leave_after=messages)
        assert world.pool.closed == 1
        assert len(sent) < 1000
        assert world.nothing_left()
        assert ended_as(world, "cancelled")

    run(scenario)


def test_a_client_that_had_it_all_and_left_is_no_failure() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(ANSWER))
        assert len(await call(world, content=body_of("/v1/completions"), leave_after=2)) == 2
        assert ended_as(world, "ok")

    run(scenario)


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_in_the_moment_its_answer_ends(
    streamed: bool, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([SSE, *stream("z")] if streamed else ANSWER))
        body = body_of("/v1/completions", {"stream": streamed})
        messages = len(await call(world, content=body))
        world.pool.scripts = [[SSE, *stream("z")] if streamed else ANSWER]
        await call(world, content=body, leave_after=messages, turns=turns)
        await asyncio.sleep(0)
        assert world.nothing_left()
        labels = {"outcome": "ok", "class": "interactive", "tenant": "anonymous"}
        assert world.value("deepsplit_requests_total", **labels) == 2

    run(scenario)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("comments", [None, 0.01])
def test_a_server_that_cancels_its_requests_leaves_nothing(comments: float | None) -> None:
    async def scenario() -> None:
        pool = FakePool(LONG)
        pool.hold = asyncio.Event()
        world = RestWorld(pool, sse_comment_interval_s=comments)
        calling = asyncio.create_task(call(world, content=STREAMED))
        await pool.sending.wait()
        await asyncio.sleep(0.03)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert pool.closed == 1
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("how", ["reset", "close", "half"])
@pytest.mark.parametrize("moment", ["in head", "in body", "while it waits", "after the head", "in mid-stream"])
def test_on_a_real_connection(moment: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        pool = FakePool(LONG)
        if moment == "while it waits":
            pool.hold = asyncio.Event()
        world = RestWorld(pool)
        async with world.served() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(STREAMED)
            cut = {"in head": 40, "in body": len(head) + 10}.get(moment)
            writer.write((head + STREAMED)[:cut])
            if moment == "in body":
                while not world.pipeline._memory.held_bytes:
                    await asyncio.sleep(0.01)
            elif moment == "while it waits":
                await pool.sending.wait()
            elif moment == "after the head":
                await reader.readuntil(b"\r\n\r\n")
            elif moment == "in mid-stream":
                await reader.readexactly(20_000)
            if how == "reset":
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            elif how == "close":
                writer.close()
            else:
                writer.write_eof()
                await reader.read()
            await world.until_nothing_left()
            writer.close()

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
