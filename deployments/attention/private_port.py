"""An attention replica's private HTTP port: vLLM's own application, for gateways, and a stream of the replica's load.

Private: every request needs the token that the directory hands to gateways, and mutual TLS if `internal_tls` is set.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.addresses import bracketed
from cluster.config import InternalTlsConfig
from cluster.tls.contexts import internal_server_ssl_context
from deployments.hosting.http_server import HttpServer, until_disconnect
from routing.requests.request import ReplicaLoad

LOAD_PATH = "/deepsplit/load"
LOAD_INTERVAL_S = 0.25
_DRAIN_POLL_S = 0.05

logger = logging.getLogger(__name__)


class ReplicaServer:
    """Serves `app` and GET LOAD_PATH: one ReplicaLoad per line, for as long as the replica takes requests."""

    def __init__(self, app: ASGIApp, load: Callable[[], Awaitable[ReplicaLoad]], tls: InternalTlsConfig | None) -> None:
        """`load` raises when the engine is dead."""
        self.token = secrets.token_urlsafe(32)
        self._app = app
        self._load = load
        self._https = tls is not None
        self._server = HttpServer(self._answer, None if tls is None else internal_server_ssl_context(tls))
        self._draining = False
        self._running = 0

    async def start(self, host: str) -> str:
        """Listen on a free port; returns the base URL."""
        port = await self._server.start(host, 0, "the attention replica's address")
        return f"{'https' if self._https else 'http'}://{bracketed(host)}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Tell the gateways to send nothing more, let running requests end for `grace_s` seconds, then break them off.
        """
        self._draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while self._running and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_S)
        await self._server.stop(2 * LOAD_INTERVAL_S)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_authorized(scope):
            await _reply(send, 401, b"this port is for the cluster's own gateways")
        elif scope["path"] == LOAD_PATH:
            await self._stream_load(receive, send)
        else:
            self._running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running -= 1

    def _is_authorized(self, scope: Scope) -> bool:
        shown = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(shown, b"Bearer " + self.token.encode())

    async def _stream_load(self, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(until_disconnect(receive))
        try:
            try:
                load = await self._load()
            except Exception:
                logger.exception("this replica takes no requests")
                await _reply(send, 503, b"the engine is dead; this replica's log says why")
                return
            head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/jsonl")]}
            await send(head)
            while not gone.done() and not self._draining:
                await send({"type": "http.response.body", "body": msgspec.json.encode(load) + b"\n", "more_body": True})
                await asyncio.sleep(LOAD_INTERVAL_S)
                try:
                    load = await self._load()
                except Exception as error:
                    logger.error("this replica takes no more requests: %r", error)
                    return  # a stream without an end tells the gateways that requests in flight are lost too
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
