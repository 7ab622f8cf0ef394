"""What a request says before its body, read the same way from HTTP headers and from gRPC metadata."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.errors import RequestError

REQUEST_ID = "x-request-id"
MAX_ID_CHARS = 128
_MAX_TRACE_CHARS = 256


@dataclass(frozen=True)
class Head:
    """One request before its body is read. `path` is the route's, never a client's own spelling of it."""

    method: str
    path: str  # of the replica's OpenAI application, such as /v1/chat/completions
    request_id: str
    key: str | None = field(default=None, repr=False)  # API key as the client sent it
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # lower-case names
    timeout_s: float | None = None  # how long the client's own deadline lets it wait; None: it has none

    def ttft_s(self) -> float | None:
        """How long the client waits for the first token; None: it did not say. Raises RequestError."""
        return _seconds(self.headers, "x-deepsplit-ttft-s")

    def total_s(self) -> float | None:
        """How long the client waits for the whole answer; None: it did not say. Raises RequestError."""
        said = [s for s in (_seconds(self.headers, "x-deepsplit-timeout-s"), self.timeout_s) if s is not None]
        return min(said, default=None)

    def priority(self) -> str | None:
        """Class that the client asked for; None: its tenant's default."""
        return self.headers.get("x-deepsplit-priority")

    def passed_on(self) -> dict[str, str]:
        """Headers that the replica gets: the request's id, and its place in a trace (W3C Trace Context)."""
        passed = {REQUEST_ID: self.request_id}
        for name in ("traceparent", "tracestate"):
            value = self.headers.get(name, "")
            if 0 < len(value) <= _MAX_TRACE_CHARS and _printable(value):
                passed[name] = value
        return passed


def read_head(
    method: str, path: str, headers: Mapping[str, str], timeout_s: float | None = None, request_id: str = ""
) -> Head:
    """`headers`: HTTP headers or gRPC metadata, names in lower case. `request_id`: from elsewhere than the headers."""
    asked = request_id or headers.get(REQUEST_ID, "")
    return Head(method, path, clean_id(asked), api_key(headers), headers, timeout_s)


def clean_id(asked: str) -> str:
    """A client's request id as it may go into logs, headers and metadata: bounded, printable ASCII; else a new one."""
    return asked[:MAX_ID_CHARS] if _printable(asked) and asked.strip() else uuid.uuid4().hex


def api_key(headers: Mapping[str, str]) -> str | None:
    """The API key of `authorization: Bearer KEY` or `x-api-key: KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key else headers.get("x-api-key")


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"{name} must be a number of seconds above 0, but is {text[:32]!r}")
    return seconds
