"""Errors as REST clients expect them: OpenAI's shape, and Anthropic's on /v1/messages."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import JSONResponse, Response

from cluster.errors import DeepsplitError, Draining, EngineRefused, ModelNotFound, Refusal, Unauthenticated
from deployments.gateway.limit_headers import retry_headers
from deployments.gateway.paths import MESSAGES, RESPONSES
from deployments.gateway.upstream.events import json_object

_MOST_ENGINE_TEXT = 500  # bytes of an answer that is no error in either shape
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_response(path: str, error: DeepsplitError) -> Response:
    """An error before the first byte of the answer."""
    headers = retry_headers(error)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Draining):
        headers["connection"] = "close"  # the next try is to reach another gateway
    return JSONResponse(_body(path, error), error.http_status, headers)


def http_error_response(path: str, status: int, message: str, code: str, headers: dict[str, str] | None) -> Response:
    """An error that is not of our tree, such as an unknown path."""
    return JSONResponse(_shape(path, status, message, None, code), status, headers)


def error_event(path: str, error: DeepsplitError) -> bytes:
    """An error in the middle of a stream, whose status line is gone, as one event; no closing [DONE] follows."""
    return _event(path, _body(path, error))


def event_of(path: str, status: int, body: bytes) -> bytes:
    """The engine's error response as the event of a stream that has begun."""
    told = json_object(body)
    if told is not None and isinstance(told.get("error"), dict):
        return _event(path, told)
    text = body[:_MOST_ENGINE_TEXT].decode(errors="replace")
    return _event(path, _shape(path, status, f"the engine answered {status}: {text}", None, EngineRefused.outcome))


def _event(path: str, data: dict[str, Any]) -> bytes:
    if path == RESPONSES:
        data = {**data["error"], "type": "error"}
    named = path == RESPONSES or path.startswith(MESSAGES)
    return (b"event: error\n" if named else b"") + b"data: " + msgspec.json.encode(data) + b"\n\n"


def _body(path: str, error: DeepsplitError) -> dict[str, Any]:
    param = "model" if isinstance(error, ModelNotFound) else None
    shaped = _shape(path, error.http_status, str(error), param, error.outcome)
    if isinstance(error, Refusal) and not path.startswith(MESSAGES):
        shaped["error"] |= {"plane": error.plane, "reason": error.reason}
    return shaped


def _shape(path: str, status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    error = {"type": _kind(status), "message": message}
    if path.startswith(MESSAGES):
        return {"type": "error", "error": error}
    return {"error": error | {"param": param, "code": code}}


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
