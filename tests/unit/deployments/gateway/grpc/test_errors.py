"""One table from errors to statuses, pushback and details; no server."""

from __future__ import annotations

import math

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cluster.errors import (
    DeepsplitError,
    EngineRefused,
    NoCapacity,
    Overloaded,
    Plane,
    QuotaExceeded,
    RateLimits,
    Reason,
    Refusal,
    RequestError,
)
from deployments.gateway.grpc.errors import Failure, failure, replica_error


def leaves(base: type[DeepsplitError]) -> list[type[DeepsplitError]]:
    return [kind for child in base.__subclasses__() for kind in [child, *leaves(child)]]


def made(kind: type[DeepsplitError]) -> DeepsplitError:
    if issubclass(kind, Refusal):
        return kind("m", retry_after_s=1, plane=Plane.QUOTA, reason=Reason.TTFT)
    return kind(500, "m") if issubclass(kind, EngineRefused) else kind("m")


@pytest.mark.parametrize("kind", leaves(DeepsplitError))
def test_each_class_of_the_tree_has_the_status_that_it_names(kind: type[DeepsplitError]) -> None:
    assert failure(made(kind)).code is grpc.StatusCode[kind.grpc_status]


def details(how: Failure) -> tuple[Status, ErrorInfo, RetryInfo | None]:
    packed = dict(how.metadata)["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status, info, retry = Status.FromString(packed), ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    return status, info, retry if len(status.details) > 1 and status.details[1].Unpack(retry) else None


def test_a_refusal_says_when_to_try_again_and_what_limits() -> None:
    limits = RateLimits(limit_requests=60, remaining_requests=0, reset_requests_s=1.5)
    why = Reason.REQUESTS_PER_MINUTE
    how = failure(QuotaExceeded("too many", retry_after_s=1.2345, plane=Plane.QUOTA, reason=why, limits=limits))
    assert dict(how.metadata[:-1]) == {
        "grpc-retry-pushback-ms": "1235", "x-deepsplit-plane": "quota", "x-deepsplit-reason": "requests_per_minute",
        "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1.5s",
    }  # fmt: skip
    status, info, retry = details(how)
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "too many")
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "QUOTA", "deepsplit", {"plane": "quota", "reason": "requests_per_minute"},
    )  # fmt: skip
    assert retry is not None
    assert retry.retry_delay.ToMilliseconds() == 1235


def test_what_can_never_be_served_is_never_tried_again() -> None:
    how = failure(Overloaded("never", retry_after_s=math.inf, plane=Plane.KV_CACHE, reason=Reason.REQUEST_OVER_BUDGET))
    assert dict(how.metadata)["grpc-retry-pushback-ms"] == "-1"
    assert details(how)[2] is None


def test_no_capacity_is_unavailable_with_pushback() -> None:
    how = failure(NoCapacity("nobody", retry_after_s=5, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA))
    assert (how.code, dict(how.metadata)["grpc-retry-pushback-ms"]) == (grpc.StatusCode.UNAVAILABLE, "5000")


def test_other_errors_have_no_pushback() -> None:
    how = failure(RequestError("wrong"))
    assert [name for name, _ in how.metadata] == ["grpc-status-details-bin"]
    assert details(how)[1].reason == "BAD_REQUEST"


def test_a_message_fits_into_metadata() -> None:
    how = failure(RequestError("é" * 100_000))
    assert len(how.message) + sum(len(value) for _, value in how.metadata) < 8192


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "INVALID_ARGUMENT"), (401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (404, "NOT_FOUND"),
        (413, "INVALID_ARGUMENT"), (422, "INVALID_ARGUMENT"), (429, "RESOURCE_EXHAUSTED"), (418, "INVALID_ARGUMENT"),
        (500, "INTERNAL"), (501, "UNIMPLEMENTED"), (502, "UNAVAILABLE"), (503, "UNAVAILABLE"),
        (504, "DEADLINE_EXCEEDED"), (507, "INTERNAL"), (302, "INTERNAL"),
    ],
)  # fmt: skip
def test_the_replicas_own_errors(status: int, code: str) -> None:
    how = failure(replica_error(status, b'{"error": {"message": "max_tokens must be 1", "code": 400, "param": null}}'))
    assert (how.code.name, how.message) == (code, "max_tokens must be 1")


@pytest.mark.parametrize("body", [b"Not Found", b'{"detail": "Not Found"}', b"\xff"])
def test_an_error_of_another_shape_is_passed_on_as_text(body: bytes) -> None:
    assert str(replica_error(404, body)) == body.decode(errors="replace")


def test_an_error_without_words() -> None:
    assert str(replica_error(500, b"")) == "the replica answered 500"
