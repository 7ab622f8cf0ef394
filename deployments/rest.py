"""The REST API as a Starlette application: what the gateway checks, and bytes passed through for all else.

It reads the model's name from a request and nothing more; vLLM, in the attention replica, validates the rest, so every
field that vLLM knows works. Knows nothing of Ray: replicas are behind the `Plane` protocol.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.config import GatewayConfig
from cluster.errors import (
    DeepsplitError,
    ModelNotFound,
    ReplicaUnavailable,
    RequestError,
    RequestTimeout,
    RequestTooLarge,
)
from deployments.attention import ResponseHead

POST_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GET_PATHS = ("/v1/models", "/v1/models/{model:path}")
READY_TIMEOUT_S = 5.0
CLIENT_CLOSED_REQUEST = 499  # nobody is left to read it; access logs are


class Plane(Protocol):
    """What the gateway needs from the attention replicas behind it."""

    def http(
        self, method: str, path: str, body: bytes, request_id: str
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """A ResponseHead, then the body's chunks. Closing it aborts the generation. Raises ReplicaUnavailable."""
        ...

    async def status(self) -> Mapping[str, object]:
        """JSON-able state of the engine and of the placement. Raises ReplicaUnavailable."""
        ...


class RestApi:
    """Routes and handlers. `app` is the ASGI application."""

    def __init__(self, model: str, limits: GatewayConfig, plane: Plane) -> None:
        self._model = model
        self._max_body_bytes = limits.max_body_mib * 2**20
        self._timeout_s = limits.request_timeout_s
        self._plane = plane
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/v1/deepsplit/status", self._status),
                *(Route(path, self._get) for path in GET_PATHS),
                *(Route(path, self._post, methods=["POST"]) for path in POST_PATHS),
            ],
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
        await self._status_within_deadline()
        return Response()

    async def _status(self, request: Request) -> Response:
        return JSONResponse({"model": self._model, **await self._status_within_deadline()})

    async def _status_within_deadline(self) -> Mapping[str, object]:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await self._plane.status()
        except TimeoutError as error:
            raise ReplicaUnavailable(f"no attention replica answered within {READY_TIMEOUT_S:.0f} s") from error

    async def _get(self, request: Request) -> Response:
        return await self._pass_through(request, b"")

    async def _post(self, request: Request) -> Response:
        body = await self._read_body(request)
        model = peek_model(body)
        if model is not None and model != self._model:
            raise ModelNotFound(f"the model {model!r} does not exist; this server has {self._model!r}")
        return await self._pass_through(request, body)

    async def _read_body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        chunks: list[bytes] = []
        if size <= self._max_body_bytes:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._max_body_bytes:
                    break
                chunks.append(chunk)
        if size > self._max_body_bytes:
            limit_mib = self._max_body_bytes // 2**20
            raise RequestTooLarge(f"the request body is larger than {limit_mib} MiB, this server's limit")
        return b"".join(chunks)

    async def _pass_through(self, request: Request, body: bytes) -> Response:
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        answer = self._plane.http(request.method, request.url.path, body, request_id)
        try:
            head = await self._next(answer, deadline)
            assert isinstance(head, ResponseHead), "a replica's answer begins with its head"
            headers = {"content-type": head.content_type}
            if head.content_type.startswith("text/event-stream"):
                return StreamingResponse(self._stream(answer, deadline), head.status, headers)
            chunks = [chunk async for chunk in self._chunks(answer, deadline)]
        except BaseException:
            await answer.aclose()
            raise
        return Response(b"".join(chunks), head.status, headers)

    async def _stream(
        self, answer: AsyncGenerator[ResponseHead | bytes, None], deadline: float
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(answer):
            try:
                async for chunk in self._chunks(answer, deadline):
                    yield chunk
            except DeepsplitError as error:  # the status line is gone: say it as an event, without a closing [DONE]
                yield b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"

    async def _chunks(
        self, answer: AsyncGenerator[ResponseHead | bytes, None], deadline: float
    ) -> AsyncGenerator[bytes, None]:
        while (chunk := await self._next(answer, deadline)) is not None:
            assert isinstance(chunk, bytes), "a replica's answer has one head"
            yield chunk

    async def _next(
        self, answer: AsyncGenerator[ResponseHead | bytes, None], deadline: float
    ) -> ResponseHead | bytes | None:
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(answer, None)
        except TimeoutError as error:
            raise RequestTimeout(f"the request took longer than {self._timeout_s:g} s and was aborted") from error


def peek_model(body: bytes) -> str | None:
    """The `model` of a JSON request body, None if it names none. Raises RequestError for what is no JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the request body must be a JSON object, not {type(fields).__name__}")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"`model` must be a string, not {type(model).__name__}")
    return model


def error_body(error: DeepsplitError) -> dict[str, dict[str, str | None]]:
    """`error` as OpenAI's clients expect it."""
    param = "model" if isinstance(error, ModelNotFound) else None
    return _openai_error(error.http_status, str(error), param, error.outcome)


def _openai_error(status: int, message: str, param: str | None, code: str) -> dict[str, dict[str, str | None]]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _on_deepsplit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeepsplitError)
    return JSONResponse(error_body(error), error.http_status)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = error.detail.lower().replace(" ", "_")
    return JSONResponse(
        _openai_error(error.status_code, message, None, code), error.status_code, headers=error.headers
    )


def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(_openai_error(500, "internal error of the gateway", None, "internal_error"), 500)
