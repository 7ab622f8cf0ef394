"""Clients that stream without pause while something is killed, and check every token. For `benchmarks.faults`."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from benchmarks.fakes.api import FakeRequest
from benchmarks.fakes.tokens import NextTokens, word
from benchmarks.measuring.sse_client import Connection, ConnectionLost, Reply, connect

_GIVE_UP_S = 60.0


@dataclass(frozen=True)
class RequestShape:
    """The size of the requests that the clients send."""

    model: str
    prompt_bytes: int
    tokens: int


@dataclass(eq=False)
class ClientRequest:
    """A request in flight at one gateway."""

    gateway: int
    connection: Connection

    @property
    def begun(self) -> bool:
        """Whether the client has read something of the answer."""
        return self.connection.reply is not None and bool(self.connection.reply.reads)


@dataclass
class Tally:
    """What became of the requests."""

    answered: int = 0  # to the last token, each one right
    again: Counter[str] = field(default_factory=Counter)  # sent again by the client, by what it saw
    failed: Counter[str] = field(default_factory=Counter)  # by what the client saw
    failed_at: list[tuple[int, float]] = field(default_factory=list)  # gateway, `time.monotonic` seconds


class FaultLoad:
    """`clients` loops over the gateways in turn. Use as an async context manager; leaving it ends all of them."""

    def __init__(self, gateways: Sequence[str], shape: RequestShape, clients: int) -> None:
        """`gateways`: URLs; one that does not listen is passed over, as a load balancer does."""
        self.tally = Tally()
        self.in_flight: set[ClientRequest] = set()
        self._gateways = gateways
        self._turn = itertools.cycle(range(len(gateways)))
        self._shape = shape
        self._clients = clients
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FaultLoad:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self) -> None:
        while not self._stopping:
            path, body, expected = _request(self._shape)
            if why := await self._until_answered(path, body, expected):
                self.tally.failed[why] += 1
            else:
                self.tally.answered += 1

    async def _until_answered(self, path: str, body: bytes, expected: str) -> str | None:
        """What went wrong, or None. Tries again where the official clients do: refused, or lost before an answer."""
        give_up_s = time.monotonic() + _GIVE_UP_S
        while time.monotonic() < give_up_s:
            gateway = next(self._turn)
            try:
                connection = await connect(self._gateways[gateway])
            except OSError:
                await asyncio.sleep(0.02)
                continue
            flight = ClientRequest(gateway, connection)
            self.in_flight.add(flight)
            try:
                async with connection:
                    reply = await connection.request("POST", path, body)
            except ConnectionLost as lost:
                if lost.reply is None or not lost.reply.reads:
                    self.tally.again["connection lost before the answer"] += 1
                    continue
                self.tally.failed_at.append((gateway, time.monotonic()))
                return "connection lost in the stream"
            finally:
                self.in_flight.discard(flight)
            if reply.status in (429, 503):
                self.tally.again[f"{reply.status}"] += 1
                await asyncio.sleep(float(reply.headers["retry-after"]))
                continue
            if why := _wrong(reply, expected):
                self.tally.failed_at.append((gateway, time.monotonic()))
            return why
        return f"not answered within {_GIVE_UP_S:.0f} s"


def _request(shape: RequestShape) -> tuple[str, bytes, str]:
    """Path, body and the right answer's text. Every prompt is another one: nothing is cached."""
    text = random.randbytes(shape.prompt_bytes // 2).hex()
    fields: dict[str, object] = {"model": shape.model, "max_tokens": shape.tokens, "stream": True}
    if random.random() < 0.5:
        path, fields = "/v1/completions", fields | {"prompt": text}
    else:
        path, fields = "/v1/chat/completions", fields | {"messages": [{"role": "user", "content": text}]}
    (prompt,) = msgspec.convert(fields, FakeRequest).prompts()
    right = NextTokens(prompt)
    return path, json.dumps(fields).encode(), "".join(word(right.next()) for _ in range(shape.tokens))


def _wrong(reply: Reply, expected: str) -> str | None:
    if reply.status != 200:
        return f"status {reply.status}"
    got, finish = "", None
    for _, event in reply.events():
        fields = json.loads(event)
        if "error" in fields:
            return f"error event: {fields['error']['code']}"
        for choice in fields["choices"]:
            got += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    if got != expected:
        return "tokens missing" if expected.startswith(got) else "wrong tokens"
    return None if reply.done and finish == "length" else "no proper end"
