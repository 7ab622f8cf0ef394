"""The one error tree. Each leaf has one HTTP status, one gRPC status name and one metric outcome.

Exceptions are for other people's mistakes (input, peers, machines); our own mistakes are asserts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Plane = Literal["quota", "gateway", "attention", "kv_cache", "experts"]


class DeepsplitError(Exception):
    """Root of every error that deepsplit raises on purpose. The message names the fix."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[str] = "internal_error"


# --- Before anything runs: what the operator gave us -------------------------------------------------------


class ConfigError(DeepsplitError):
    """The configuration file is not valid."""

    outcome = "config_error"


class CheckpointError(DeepsplitError):
    """The model directory is missing, incomplete, truncated or not one that can be split."""

    outcome = "checkpoint_error"


class PlanError(DeepsplitError):
    """What was asked for does not fit on the nodes, or cannot be divided as asked."""

    outcome = "plan_error"


class StartupError(DeepsplitError):
    """A process could not start: port in use, wrong version, plugin not in place, already running."""

    outcome = "startup_error"


# --- On the expert plane -----------------------------------------------------------------------------------


class FrameError(DeepsplitError):
    """A wire frame is corrupt, oversized or of a shape that does not fit the model. Not worth a retry."""

    http_status = 502
    grpc_status = "INVALID_ARGUMENT"
    outcome = "bad_frame"


class StalePlacement(DeepsplitError):
    """The placement epoch of a call is older than the worker serves: split again with a fresh table."""

    http_status = 503
    grpc_status = "FAILED_PRECONDITION"
    outcome = "stale_placement"


class WorkerLost(DeepsplitError):
    """An expert worker died, hung or was cut off while it held rows: send them to another holder."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "worker_lost"


class UncoveredExperts(DeepsplitError):
    """No live worker holds some of the experts that are needed, and the wait for one ran out."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "uncovered"


class DispatchTimeout(DeepsplitError):
    """The retry loop of one dispatch ran out of time or attempts."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    outcome = "dispatch_timeout"


# --- At the door -------------------------------------------------------------------------------------------


class RequestError(DeepsplitError):
    """The client's request is not valid."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    outcome = "bad_request"


class RequestTooLarge(DeepsplitError):
    """The client's request body is over the configured bound."""

    http_status = 413
    grpc_status = "INVALID_ARGUMENT"
    outcome = "too_large"


class Unauthenticated(DeepsplitError):
    """No API key, or one that nobody was given."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    outcome = "unauthenticated"


class PermissionDenied(DeepsplitError):
    """The key's tenant may not use this model or this priority class."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    outcome = "forbidden"


class RequestTimeout(DeepsplitError):
    """The request was not answered within its deadline, and its generation was aborted."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    outcome = "request_timeout"


class ModelNotFound(DeepsplitError):
    """The request names a model that is not served here."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    outcome = "model_not_found"


class ReplicaUnavailable(DeepsplitError):
    """No attention replica can take the request, or the one that had it died."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "replica_unavailable"


class StreamLost(DeepsplitError):
    """The attention replica of a running stream died, and the stream cannot be continued exactly elsewhere."""

    http_status = 502
    grpc_status = "ABORTED"
    outcome = "stream_lost"


@dataclass(frozen=True)
class RateLimits:
    """Where a tenant's budgets stand, for `x-ratelimit-*` headers. None: no such limit."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float = 0.0  # seconds until the budget is whole again
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float = 0.0


class Refusal(DeepsplitError):
    """A valid request that is not served now; trying again after `retry_after_s` is worth it.

    `plane` names what limits: quota, gateway, attention, kv_cache or experts. `reason` is a short, bounded word for
    metrics.
    """

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    outcome = "refused"

    def __init__(
        self, message: str, *, retry_after_s: float, plane: Plane, reason: str, limits: RateLimits | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.plane = plane
        self.reason = reason
        self.limits = limits


class QuotaExceeded(Refusal):
    """The tenant's own budget (requests, tokens or streams) is used up."""

    outcome = "quota"


class Overloaded(Refusal):
    """The cluster would miss the request's deadline or its class's objective, or a bound of the gateway is reached."""

    outcome = "overloaded"


class Draining(Refusal):
    """This gateway is being stopped: another one, or this one restarted, will answer."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "draining"


class NoCapacity(Refusal):
    """No attention replica is ready, or no expert worker holds some experts."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "no_capacity"
