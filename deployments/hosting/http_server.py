"""An HTTP server inside a Serve replica: uvicorn on a socket of its own, hardened against slow and huge peers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from asyncio.events import TimerHandle
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import StartupError

MAX_HEADER_BYTES = 64 * 1024
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request, or from the connection, to the end of its headers
WRITE_STALL_S = 30.0  # a client that reads nothing for this long is gone
KEEP_ALIVE_S = 75
_BACKLOG = 2048


def _not_a_cancellation(record: logging.LogRecord) -> bool:
    """Requests that are cut off when the grace is over are no bugs, and need no traceback each."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


logging.getLogger("uvicorn.error").addFilter(_not_a_cancellation)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the three bounds that it lacks: header size, header time, time without a read."""

    _header_bytes = 0
    _in_headers = True
    _header_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            if self._header_timer is None:
                self._await_headers()
            self._header_bytes += len(data)
            # Bodies share the first packet with their headers, so only what stays unfinished counts.
            super().data_received(data)
            if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"Request headers are larger than {MAX_HEADER_BYTES} bytes.")
        else:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_headers = True  # of the next request, whose timer starts with its first byte

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)


class _Server(uvicorn.Server):
    """Signals are the host process's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class HttpServer:
    """Serves one ASGI application on one address, on the running event loop."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",  # a bound method would be taken for another
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=_BACKLOG,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, key: str, share_port: bool = False) -> int:
        """Listen; returns the port (0 takes a free one). `share_port`: other processes of ours listen there too.

        Raises StartupError that names the configuration's `key`.
        """
        listener = _listen(host, port, key, share_port)
        bound: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.01)
        return bound

    def close_listener(self) -> None:
        """Accept no new connection; running requests go on."""
        for server in self._server.servers:
            server.close()

    async def stop(self, grace_s: float) -> None:
        """Stop listening, let running requests end for `grace_s`, then cancel them."""
        if self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
        self._server.should_exit = True
        # Idle and half-read connections must not hold up the end beyond the grace.
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._serving, grace_s + 2.0)


def _listen(host: str, port: int, key: str, share_port: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        if isinstance(error, socket.gaierror):
            reason = str(error.strerror)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}; see {key}") from error
    listener.setblocking(False)
    return listener
