"""Clients that ask again as soon as they are answered, and what that costs the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from benchmarks.measuring.sse_client import Connection, Reply, connect


async def closed_loop(
    url: str, ask: Callable[[Connection], Awaitable[Reply]], cpu_s: Callable[[], float], clients: int, seconds: float
) -> tuple[float, float]:
    """Returns requests per second and CPU seconds per request.

    `ask`: one request on a client's connection to `url`. `cpu_s`: the server's CPU time so far.
    """
    answered = 0

    async def one(connection: Connection) -> None:
        nonlocal answered
        while time.monotonic() < until_s:
            reply = await ask(connection)
            assert reply.status == 200, reply.body
            answered += 1

    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(await connect(url)) for _ in range(clients)]
        before_s, started_s = cpu_s(), time.monotonic()
        until_s = started_s + seconds
        await asyncio.gather(*(one(connection) for connection in opened))
        return answered / (time.monotonic() - started_s), (cpu_s() - before_s) / answered
