"""What holds for every HTTP request, whatever its path: ids, spelling, bugs, pages of other origins."""

from __future__ import annotations

import logging
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import DeepsplitError
from deployments.gateway.head import REQUEST_ID, clean_id
from deployments.gateway.limit_headers import RATE_LIMIT_HEADERS, RETRY_HEADERS
from deployments.gateway.rest.errors import error_response

_SHOWN_TO_PAGES = (
    REQUEST_ID, *RETRY_HEADERS, *RATE_LIMIT_HEADERS, "x-deepsplit-predicted-ttft-s", "x-deepsplit-degraded",
)  # fmt: skip

logger = logging.getLogger(__name__)


def cors(origins: Collection[str]) -> list[Middleware]:
    """Lets pages of these origins call the API from a browser. None: nothing is added."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=("GET", "HEAD", "POST"), allow_headers=("*",),
            expose_headers=_SHOWN_TO_PAGES,
        )
    ]  # fmt: skip


class EveryRequest:
    """Gives every request an id, the client's if it sent one, and shows it in the response. Takes a path with a slash
    at its end for the one without: a redirect would name `http` behind a proxy that ends TLS. Logs bugs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = clean_id(Headers(scope=scope).get(REQUEST_ID, ""))
        path: str = scope["path"]
        scope = {**scope, "path": path.removesuffix("/") or "/", "state": {"request_id": request_id}}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as bug:
            if started:
                raise
            await error_response(path, reported(bug, request_id))(scope, receive, send_with_id)


def reported(bug: Exception, request_id: str) -> DeepsplitError:
    """What a client is told of a bug, which is logged."""
    logger.error("a bug ended a request", exc_info=bug, extra={"fields": {"request_id": request_id}})
    return DeepsplitError(f"internal error of the gateway; its log says more about the request {request_id}")
