"""Errors as REST clients expect them: OpenAI's shape, and Anthropic's on /v1/messages."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse, Response

from cluster.errors import DeepsplitError, Draining, ModelNotFound, Refusal, Unauthenticated
from deployments.gateway.limit_headers import retry_headers

_ANTHROPIC_PATHS = "/v1/messages"
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
    if path.startswith(_ANTHROPIC_PATHS):
        return JSONResponse({"type": "error", "error": {"type": _kind(status), "message": message}}, status, headers)
    return JSONResponse({"error": _openai(status, message, None, code)}, status, headers)


def error_event(path: str, error: DeepsplitError) -> bytes:
    """An error in the middle of a stream, whose status line is gone, as one event; no closing [DONE] follows."""
    data = _body(path, error)
    name = b""
    if path == "/v1/responses":
        name, data = b"event: error\n", {"type": "error", **data["error"]}
    elif path.startswith(_ANTHROPIC_PATHS):
        name = b"event: error\n"
    return name + b"data: " + json.dumps(data).encode() + b"\n\n"


def event_of(path: str, body: bytes) -> bytes:
    """An error response's body as the event of a stream that has begun."""
    named = path == "/v1/responses" or path.startswith(_ANTHROPIC_PATHS)
    return (b"event: error\n" if named else b"") + b"data: " + body + b"\n\n"


def _body(path: str, error: DeepsplitError) -> dict[str, Any]:
    if path.startswith(_ANTHROPIC_PATHS):
        return {"type": "error", "error": {"type": _kind(error.http_status), "message": str(error)}}
    param = "model" if isinstance(error, ModelNotFound) else None
    body: dict[str, Any] = _openai(error.http_status, str(error), param, error.outcome)
    if isinstance(error, Refusal):
        body |= {"plane": error.plane, "reason": error.reason}
    return {"error": body}


def _openai(status: int, message: str, param: str | None, code: str) -> dict[str, str | None]:
    return {"message": message, "type": _kind(status), "param": param, "code": code}


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
