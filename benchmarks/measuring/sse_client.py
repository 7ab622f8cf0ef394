"""A measuring HTTP/1.1 client: one keep-alive connection, one request at a time, every read with its time.

Bare sockets and httptools' C parser: what it costs itself must be small beside what it measures. Times are
`time.monotonic` seconds, which processes of one machine share.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httptools

_DATA = b"data: "
_DONE = b"data: [DONE]"


@dataclass
class Reply:
    """One answer, possibly still growing."""

    sent_s: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reads: list[tuple[float, bytes]] = field(default_factory=list)  # body bytes of one read, with its time
    ended_s: float | None = None

    @property
    def body(self) -> bytes:
        """All of it so far."""
        return b"".join(data for _, data in self.reads)

    def json(self) -> object:
        """The whole body as JSON."""
        return json.loads(self.body)

    def events(self) -> list[tuple[float, bytes]]:
        """(time, payload) of every server-sent event but the closing [DONE]."""
        found: list[tuple[float, bytes]] = []
        rest = b""
        for at_s, data in self.reads:
            *whole, rest = (rest + data).split(b"\n\n")
            found += [(at_s, event[len(_DATA) :]) for event in whole if event.startswith(_DATA) and event != _DONE]
        return found

    @property
    def done(self) -> bool:
        """Whether the stream was closed by [DONE]."""
        return self.body.rstrip().endswith(_DONE)

    def ttft_s(self) -> float:
        """From sending the request to the first event."""
        return self.events()[0][0] - self.sent_s

    def tpot_s(self) -> float:
        """Mean time per event after the first one."""
        events = self.events()
        return (events[-1][0] - events[0][0]) / (len(events) - 1)


class ConnectionLost(ConnectionError):
    """The server closed the connection before the answer was complete."""

    def __init__(self, reply: Reply | None) -> None:
        """`reply`: what there is of the answer."""
        super().__init__("the server closed the connection before the answer was complete")
        self.reply = reply


class Connection(asyncio.Protocol):
    """Use as `async with await connect(url) as connection`."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.reply: Reply | None = None  # of the newest request
        self._waiting: asyncio.Future[None] | None = None
        self._wanted = 0  # events, or 0 for the whole answer
        self._seen = 0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        events: int = 0,
    ) -> Reply:
        """Send, and return the whole answer, or what there is of it after `events` events. Raises ConnectionLost."""
        fields = {"host": self._host, "content-type": "application/json", "content-length": len(body)}
        lines = [f"{method} {path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (fields | dict(headers or {})).items()]
        assert self._transport is not None
        self._wanted, self._seen = events, 0
        self._waiting = asyncio.get_running_loop().create_future()
        reply = self.reply = Reply(time.monotonic())
        self._transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self._waiting
        return reply

    async def rest(self) -> Reply:
        """The remainder of an answer of which some events were asked for."""
        assert self.reply is not None
        if self.reply.ended_s is None:
            self._wanted = 0
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self.reply

    def abort(self) -> float:
        """Close at once, as a client that goes away does; returns the time."""
        assert self._transport is not None
        self._transport.abort()
        return time.monotonic()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._transport is not None
        self._transport.close()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(ConnectionLost(self.reply))

    # --- httptools ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.reply is not None:
            self.reply.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        if self.reply is None:
            return
        self.reply.status = self._parser.get_status_code()
        self.reply.reads.append((self._now_s, data))
        if self._wanted:
            self._seen += data.count(_DATA)
            if self._seen >= self._wanted:
                self._end(None)

    def on_message_complete(self) -> None:
        if self.reply is not None:
            self.reply.status = self._parser.get_status_code()
            self.reply.ended_s = self._now_s
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            if error is None:
                self._waiting.set_result(None)
            else:
                self._waiting.set_exception(error)


async def connect(url: str, tls: ssl.SSLContext | None = None) -> Connection:
    """A connection to the host and port of `url`. Raises OSError."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    host = f"{parts.hostname}:{parts.port}"
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(host), parts.hostname, parts.port, ssl=tls)
    return connection
