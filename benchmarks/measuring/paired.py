"""The same streams to two servers in turn, and what one adds to the other. For `benchmarks.gateway_cost`."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import psutil

from benchmarks.measuring.sse_client import Connection, Reply, connect

_STAGGER_S = 0.1  # concurrent streams begin within this time, not all at once


@dataclass(frozen=True)
class Server:
    """Where to send a request, and which processes answer it."""

    url: str
    headers: Mapping[str, str]
    processes: Sequence[psutil.Process]

    def cpu_s(self) -> float:
        """CPU time so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def rss_bytes(self) -> int:
        """Resident memory now."""
        return sum(process.memory_info().rss for process in self.processes)


@dataclass(frozen=True)
class Asked:
    """One kind of request."""

    path: str
    fields: Mapping[str, object]

    def body(self, tokens: int, stream: bool = True) -> bytes:
        """JSON. A prompt of its own each time, or a prefix cache would answer the second of a pair sooner."""
        prompt = {"prompt": f"{random.getrandbits(64):x} def split("}
        return json.dumps(prompt | dict(self.fields) | {"max_tokens": tokens, "stream": stream}).encode()


@dataclass
class Added:
    """Differences of pairs, in milliseconds; and the two servers' own medians."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    delay_ms: list[float] = field(default_factory=list)  # of the mean time of a token since the request was sent
    direct_ttft_ms: list[float] = field(default_factory=list)
    direct_tpot_ms: list[float] = field(default_factory=list)


async def compare(direct: Server, gateway: Server, asked: Asked, count: int, tokens: int, pairs: int) -> Added:
    """`pairs` times `count` concurrent streams to either server, in random order."""
    added = Added()
    async with AsyncExitStack() as stack:
        opened = {
            server.url: [await stack.enter_async_context(await connect(server.url)) for _ in range(count)]
            for server in (direct, gateway)
        }
        for turn in range(pairs + 2):  # the first two warm up
            replies: dict[str, list[Reply]] = {}
            for server in random.sample((direct, gateway), 2):
                replies[server.url] = await _streams(server, opened[server.url], asked, tokens)
            if turn >= 2:
                _add(added, replies[direct.url], replies[gateway.url])
    return added


async def _streams(server: Server, opened: Sequence[Connection], asked: Asked, tokens: int) -> list[Reply]:
    async def one(connection: Connection) -> Reply:
        await asyncio.sleep(random.random() * _STAGGER_S * (len(opened) > 1))
        return await connection.request("POST", asked.path, asked.body(tokens), server.headers)

    replies = await asyncio.gather(*map(one, opened))
    for reply in replies:
        assert reply.status == 200, reply.body
        assert reply.done, reply.body[-300:]
    return replies


def _add(added: Added, direct: Sequence[Reply], gateway: Sequence[Reply]) -> None:
    """One entry per stream. Concurrent ones are paired by rank: what queues in the engine does so in both."""
    for values, value in (
        (added.ttft_ms, Reply.ttft_s),
        (added.tpot_ms, Reply.tpot_s),
        (added.delay_ms, _mean_arrival_s),
    ):
        ranked = zip(sorted(map(value, gateway)), sorted(map(value, direct)), strict=True)
        values += [1e3 * (theirs - own) for theirs, own in ranked]
    added.direct_ttft_ms += [1e3 * reply.ttft_s() for reply in direct]
    added.direct_tpot_ms += [1e3 * reply.tpot_s() for reply in direct]


def _mean_arrival_s(reply: Reply) -> float:
    return statistics.fmean(at_s - reply.sent_s for at_s, _ in reply.events())


def spread(values: Sequence[float]) -> str:
    """`median [quartiles]`."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"
