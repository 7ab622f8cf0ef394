"""The REST API as a Starlette application: HTTP in, `Call` to the door, `Answer` out. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import DeepsplitError, RequestError, RequestTimeout, RequestTooLarge
from deployments.gateway.door import Answer, Call, Door
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.rest.errors import error_event, error_response, http_error_response
from routing.requests.request import Tenant

GENERATE_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
POST_PATHS = (*GENERATE_PATHS, "/tokenize", "/detokenize", "/v1/messages/count_tokens")
GET_PATHS = ("/v1/models", "/v1/models/{model:path}")
CLIENT_CLOSED_REQUEST = 499  # nobody is left to read it; access logs are
MAX_ID_CHARS = 128
_BODY_TIMEOUT_S = 60.0  # a body that takes longer to arrive is a slow attack or a dead client


class RestDoor(Door, Protocol):
    """The door, and whose key it is."""

    def identify(self, key: str | None) -> Tenant: ...


class RestApi:
    """Routes and handlers. `app` is the ASGI application."""

    def __init__(
        self, door: RestDoor, max_body_bytes: int, pages: OperatorPages, openapi: Callable[[], Awaitable[bytes]]
    ) -> None:
        """`openapi` raises DeepsplitError when no replica answers."""
        self._door = door
        self._max_body_bytes = max_body_bytes
        self._openapi_source = openapi
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/openapi.json", self._openapi),
                *pages.routes(door, _key),
                *(Route(path, self._handle) for path in GET_PATHS),
                *(Route(path, self._handle, methods=["POST"]) for path in POST_PATHS),
            ],
            middleware=[Middleware(_RequestIds)],
            exception_handlers={
                DeepsplitError: _on_deepsplit_error,
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: _on_bug,
            },
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _ready(self, request: Request) -> Response:
        models = dict(self._door.ready())
        return JSONResponse({"models": models}, 200 if all(models.values()) else 503)

    async def _openapi(self, request: Request) -> Response:
        return Response(await self._openapi_source(), media_type="application/json")

    async def _handle(self, request: Request) -> Response:
        path, key, body = request.url.path, _key(request), b""
        if request.method == "POST":
            with self._door.arriving(path, key, request.state.request_id):
                body = await self._read_body(request)
        call = Call(
            method=request.method,
            path=path,
            body=body,
            request_id=request.state.request_id,
            key=key,
            priority=request.headers.get("x-deepsplit-priority"),
            timeout_s=_seconds(request, "x-deepsplit-timeout-s"),
            ttft_s=_seconds(request, "x-deepsplit-ttft-s"),
        )
        return await _while_connected(request, self._answer(call))

    async def _answer(self, call: Call) -> Response:
        answer = await self._door.answer(call)
        if answer.content_type.startswith("text/event-stream"):
            return _Stream(call.path, answer)
        headers = dict(answer.headers) | {"content-type": answer.content_type}
        async with aclosing(answer.chunks):
            return Response(b"".join([chunk async for chunk in answer.chunks]), answer.status, headers)

    async def _read_body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                if size <= self._max_body_bytes:
                    size = 0
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > self._max_body_bytes:
                            break
                        chunks.append(chunk)
        except TimeoutError as error:
            raise RequestTimeout(f"the request body did not arrive within {_BODY_TIMEOUT_S:g} s") from error
        if size > self._max_body_bytes:
            limit_mib = self._max_body_bytes // 2**20
            raise RequestTooLarge(f"the request body is larger than {limit_mib} MiB, this server's limit")
        return b"".join(chunks)


class _RequestIds:
    """Every request has an id, the client's if it sent one, and every response shows it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = Headers(scope=scope).get("x-request-id", "")[:MAX_ID_CHARS] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class _Stream(StreamingResponse):
    """Server-sent events, one chunk per token. However it ends, the generation behind it does too."""

    def __init__(self, path: str, answer: Answer) -> None:
        # Proxies that buffer would undo the flush per token.
        unbuffered = {"content-type": answer.content_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(path, answer), answer.status, dict(answer.headers) | unbuffered)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.chunks.aclose()


async def _events(path: str, answer: Answer) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in answer.chunks:
            yield chunk
    except DeepsplitError as error:
        yield error_event(path, error)


async def _while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """The response; a client that goes away meanwhile cancels `work`, as it would a stream that has begun."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnect(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError, DeepsplitError):
            await working


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _key(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key else request.headers.get("x-api-key")


def _seconds(request: Request, name: str) -> float | None:
    text = request.headers.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"{name} must be a number of seconds above 0, but is {text[:32]!r}")
    return seconds


def _on_deepsplit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeepsplitError)
    return error_response(request.url.path, error)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = error.detail.lower().replace(" ", "_")
    headers = dict(error.headers) if error.headers else None
    return http_error_response(request.url.path, error.status_code, message, code, headers)


def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _on_bug(request: Request, error: Exception) -> Response:
    return http_error_response(request.url.path, 500, "internal error of the gateway", "internal_error", None)
