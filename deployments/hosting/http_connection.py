"""One HTTP/1.1 connection: uvicorn's protocol, hardened against slow and huge peers."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import sys
import termios
from array import array
from asyncio.events import TimerHandle
from dataclasses import dataclass
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

MAX_HEADER_BYTES = 64 * 1024
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its headers
UNREAD_BODY_TIMEOUT_S = 10.0  # for the rest of a body whose request has its answer, such as 401
_STALL_CHECKS = 4  # per write_stall_s
_OFFER = (b"connection", b"upgrade", b"http2-settings")


@dataclass(frozen=True)
class ConnectionBounds:
    """How long a connection may do nothing, in seconds."""

    idle_timeout_s: float = 75.0  # between two requests
    first_request_timeout_s: float = 10.0  # before the first byte of the first one
    write_stall_s: float = 30.0  # while the peer reads nothing of an answer that waits for it


DEFAULT_BOUNDS = ConnectionBounds()


class _Parser(httptools.HttpRequestParser):
    """Reads a request that offers another protocol as if it did not, which a server may (RFC 9110, 7.8).

    Java's default client offers HTTP/2 with every request. The parser takes what follows such a head for the other
    protocol, so the head is parsed a second time, without the offer.
    """

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    def feed_data(self, data: bytes | bytearray | memoryview[int] | array[int]) -> None:
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if not self.offers_upgrade():
                raise
            self._protocol.read_again(bytes(data[offer.args[0] :]))

    def offers_upgrade(self) -> bool:
        """Whether the head that was just read has an offer. CONNECT, which nobody answers, counts as an upgrade too."""
        return self.should_upgrade() and self.get_method() != b"CONNECT"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the bounds that it lacks: header size, time to a first request and for its headers, time
    without a read. Answers of unknown length end with the connection for HTTP/1.0, which knows no chunks.
    """

    _head_bytes = 0  # since the last head was whole, or the last piece of a body came
    _in_body = False
    _header_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        bounds: ConnectionBounds,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = bounds
        self.parser: _Parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_in(self._bounds.first_request_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._in_body and not self._head_bytes and not self._is_answering():
            self._close_in(HEADER_TIMEOUT_S)
        self._head_bytes += len(data)
        super().data_received(data)
        # A body in the same packet has set it back, so only what stays unfinished counts: a head, or trailers.
        if self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            if self._in_body:
                self.transport.close()
            else:
                self.send_400_response(f"Request headers are larger than {MAX_HEADER_BYTES} bytes.")

    def read_again(self, rest: bytes) -> None:
        """Read the head that was just read once more, without its offer of another protocol, and what follows it."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in _OFFER]
        options = b",".join(value for name, value in self.headers if name == b"connection").split(b",")
        if kept := [option for option in options if option.strip().lower() not in _OFFER]:
            lines.append(b"connection:" + b",".join(kept))
        self.parser = _Parser(self)
        self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def on_headers_complete(self) -> None:
        if self.parser.offers_upgrade():
            return  # it comes again
        self._in_body = True
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers are for nobody
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.offers_upgrade():
            return
        super().on_message_complete()
        self._in_body = False  # the next request's timer starts with its first byte
        self._head_bytes = 0
        self._stop_header_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answering():  # a request that came behind this one
            return
        if self._in_body:  # nobody reads it any more
            self._close_in(UNREAD_BODY_TIMEOUT_S)
        elif self._head_bytes:
            self._close_in(HEADER_TIMEOUT_S)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        super()._start_asgi_task(cycle, _unchunked(app, cycle) if cycle.scope["http_version"] == "1.0" else app)  # type: ignore[arg-type]

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self._unread_bytes(), 0)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _watch_reader(self, unread_before: int, idle_checks: int) -> None:
        """Cuts the connection when its peer reads nothing for as long as it may."""
        unread = self._unread_bytes()
        idle_checks = idle_checks + 1 if unread >= unread_before else 0
        if idle_checks > _STALL_CHECKS:
            self.transport.abort()
            return
        every_s = self._bounds.write_stall_s / _STALL_CHECKS
        self._write_timer = self.loop.call_later(every_s, self._watch_reader, unread, idle_checks)

    def _unread_bytes(self) -> int:
        """Bytes of the answer that the peer has not taken: ours and the kernel's, which tells us of room only in large
        steps.
        """
        waiting = self.transport.get_write_buffer_size()
        connection: socket.socket = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, ValueError):  # a connection that has just been closed
            waiting += int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return waiting

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_in(self, seconds: float) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _unchunked(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Sends what has no length as it is: uvicorn would chunk it. It closes the connection after HTTP/1.0 anyway."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        unknown = False

        async def send_plain(message: Message) -> None:
            nonlocal unknown
            if message["type"] == "http.response.start":
                unknown = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if unknown:
                    cycle.chunked_encoding = False
            elif unknown:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return serve
