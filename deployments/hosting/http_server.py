"""An HTTP server inside a Serve replica: uvicorn on sockets of its own, hardened against slow and huge peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive

from deployments.hosting.http_connection import DEFAULT_BOUNDS, BoundedProtocol, ConnectionBounds
from deployments.hosting.listeners import listen

_BACKLOG = 2048


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
        listeners = listen(host, port, key, share_port)
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


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client of an ASGI application has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
