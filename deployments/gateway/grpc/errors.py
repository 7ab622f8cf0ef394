"""Errors as gRPC clients expect them: a status, when to try again, and google.rpc's rich details."""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
import msgspec
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cluster.errors import DeepsplitError, EngineRefused, Refusal
from deployments.gateway.limit_headers import rate_limit_headers

Metadata = tuple[tuple[str, str | bytes], ...]

_DOMAIN = "deepsplit"
_MAX_MESSAGE_CHARS = 1000  # it travels twice, in metadata that clients bound to 8 KiB, escaped or in base64
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Error(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    """What OpenAI's API answers in place of 200."""

    error: _Error


@dataclass(frozen=True)
class Failure:
    """How a call ends that failed."""

    code: grpc.StatusCode
    message: str
    metadata: Metadata  # trailing


BUG = Failure(grpc.StatusCode.INTERNAL, "internal error of the gateway", ())


def failure(error: DeepsplitError) -> Failure:
    """The one mapping of errors to gRPC."""
    message = str(error)[:_MAX_MESSAGE_CHARS]
    if isinstance(error, EngineRefused):
        return Failure(_code(error.status), message, ())
    code = grpc.StatusCode[error.grpc_status]
    info = ErrorInfo(reason=error.outcome.upper(), domain=_DOMAIN)
    metadata: Metadata = ()
    details: list[ErrorInfo | RetryInfo] = [info]
    if isinstance(error, Refusal):
        info.metadata.update({"plane": error.plane, "reason": error.reason})
        again = not math.isinf(error.retry_after_s)
        retry_ms = math.ceil(error.retry_after_s * 1000) if again else -1  # below 0: never (gRPC's retry design)
        if again:
            details.append(RetryInfo(retry_delay=_milliseconds(retry_ms)))
        metadata = (
            ("grpc-retry-pushback-ms", str(retry_ms)),
            ("x-deepsplit-plane", error.plane),
            ("x-deepsplit-reason", error.reason),
            *rate_limit_headers(error.limits).items(),
        )
    status = Status(code=code.value[0], message=message, details=[_packed(detail) for detail in details])
    return Failure(code, message, (*metadata, ("grpc-status-details-bin", status.SerializeToString())))


def replica_error(status: int, body: bytes) -> EngineRefused:
    """From an answer of the replica that is not 200."""
    try:
        message = msgspec.json.decode(body, type=_ErrorBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):  # not OpenAI's shape: a server in between, or FastAPI itself
        message = body.decode("utf-8", "replace")
    return EngineRefused(status, message or f"the replica answered {status}")


def _code(status: int) -> grpc.StatusCode:
    fallback = grpc.StatusCode.INVALID_ARGUMENT if 400 <= status < 500 else grpc.StatusCode.INTERNAL
    return _CODES.get(status, fallback)


def _packed(detail: ErrorInfo | RetryInfo) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _milliseconds(milliseconds: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(milliseconds)
    return duration
