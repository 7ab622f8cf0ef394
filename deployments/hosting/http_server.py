"""An HTTP server inside a Serve replica: uvicorn on sockets of its own, hardened against slow and huge peers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cluster.errors import StartupError
from deployments.hosting.http_connection import DEFAULT_BOUNDS, BoundedProtocol, ConnectionBounds

_BACKLOG = 2048
# A name may have addresses that the machine has not, such as ::1 where IPv6 is off.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def _not_a_cancellation(record: logging.LogRecord) -> bool:
    """Requests that are cut off when the grace is over are no bugs, and need no traceback each."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


logging.getLogger("uvicorn.error").addFilter(_not_a_cancellation)


class _Server(uvicorn.Server):
    """Signals are the host process's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class HttpServer:
    """Serves one ASGI application on one address, on the running event loop."""

    def __init__(
        self, app: ASGIApp, tls: ssl.SSLContext | None = None, bounds: ConnectionBounds = DEFAULT_BOUNDS
    ) -> None:
        config = uvicorn.Config(
            app,
            interface="asgi3",  # a bound method would be taken for another
            http=partial(BoundedProtocol, bounds=bounds),  # type: ignore[arg-type]  # called as the class is
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=bounds.idle_timeout_s,  # type: ignore[arg-type]  # any number of seconds
            backlog=_BACKLOG,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, key: str, share_port: bool = False) -> int:
        """Listen on every address of `host`; returns the port (0 takes a free one). `share_port`: other processes of
        ours listen there too.

        Raises StartupError that names the configuration's `key`.
        """
        listeners = _listen(host, port, key, share_port)
        bound: int = listeners[0].getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(listeners))
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


def _listen(host: str, port: int, key: str, share_port: bool) -> list[socket.socket]:
    """One listener for each address of the name `host` that this machine has, all on one port."""
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
        for number, (family, address) in enumerate(addresses, 1):
            try:
                listener = _bound(family, (address[0], port, *address[2:]), share_port, len(addresses) > 1)
            except OSError as error:
                if error.errno not in _NOT_HERE or (number == len(addresses) and not listeners):
                    raise
            else:
                listeners.append(listener)
                port = listener.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.close()
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        if isinstance(error, socket.gaierror):
            reason = str(error.strerror)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}; see {key}") from error
    return listeners


def _bound(family: int, address: tuple[object, ...], share_port: bool, beside_others: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and beside_others:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
