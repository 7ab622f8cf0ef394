"""The one error tree. Each leaf has one HTTP status, one gRPC status name and one metric outcome.

Exceptions are for other people's mistakes (input, peers, machines); our own mistakes are asserts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Plane(StrEnum):
    """What limits when a request is refused."""

    QUOTA = "quota"
    GATEWAY = "gateway"
    ATTENTION = "attention"
    KV_CACHE = "kv_cache"
    EXPERTS = "experts"


class Reason(StrEnum):
    """Why a request is refused: labels of `deepsplit_refusals_total`, explained in docs/gateway.md."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    MAX_STREAMS = "max_streams"
    REQUEST_OVER_BUDGET = "request_over_budget"
    TTFT = "ttft"
    TPOT = "tpot"
    DEADLINE = "deadline"
    WAITED = "waited"
    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"
    NO_REPLICA = "no_replica"
    DRAINING = "draining"
    SIDE_CALLS = "side_calls"
    BODIES = "bodies"


class DeepsplitError(Exception):
    """Root of every error that deepsplit raises on purpose. The message names the fix."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    outcome: ClassVar[str] = "internal_error"


# What may be done about an error: each leaf below has one of these bases, or none where nothing helps.


class OperatorError(DeepsplitError):
    """What the operator gave us cannot work: nothing starts until it is mended."""


class ElsewhereError(DeepsplitError):
    """One process could not do it: the same work may be sent to another one at once."""


class ClientError(DeepsplitError):
    """The request itself is at fault: sent again, it fails again."""


# --- Before anything runs: what the operator gave us -------------------------------------------------------


class ConfigError(OperatorError):
    """The configuration file is not valid."""

    outcome = "config_error"


class CheckpointError(OperatorError):
    """The model directory is missing, incomplete, truncated or not one that can be split."""

    outcome = "checkpoint_error"


class PlanError(OperatorError):
    """What was asked for does not fit on the nodes, or cannot be divided as asked."""

    outcome = "plan_error"


class StartupError(OperatorError):
    """A process could not start: port in use, wrong version, plugin not in place, already running."""

    outcome = "startup_error"


# --- On the expert plane -----------------------------------------------------------------------------------


class FrameError(DeepsplitError):
    """A wire frame is corrupt, oversized or of a shape that does not fit the model: a defect of who sent it."""

    http_status = 502
    grpc_status = "INVALID_ARGUMENT"
    outcome = "bad_frame"


class StalePlacement(ElsewhereError):
    """The worker does not hold some of the experts that it was asked for: the placement table is out of date.

    `experts`: which (global ids); empty if it did not say.
    """

    http_status = 503
    grpc_status = "FAILED_PRECONDITION"
    outcome = "stale_placement"

    def __init__(self, message: str, experts: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.experts = experts


class WorkerLost(ElsewhereError):
    """An expert worker died, hung or was cut off while it held rows: send them to another holder."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "worker_lost"


class WorkerSilent(WorkerLost):
    """An expert worker's connection is well, but its reply did not come in time."""

    outcome = "worker_silent"


class WorkerLate(ElsewhereError):
    """An expert worker takes much longer than usual, and somebody else can do it: nobody waits for this reply."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "worker_late"


class WorkerBusy(ElsewhereError):
    """An expert worker has more work than it can do before the caller gives up. `queue_s`: how long requests waited."""

    http_status = 503
    grpc_status = "RESOURCE_EXHAUSTED"
    outcome = "worker_busy"

    def __init__(self, message: str, queue_s: float = 0.0) -> None:
        super().__init__(message)
        self.queue_s = queue_s


class WorkerFailing(ElsewhereError):
    """An expert worker could not compute. `fenced`: it takes no more work and waits to be replaced."""

    http_status = 503
    grpc_status = "INTERNAL"
    outcome = "worker_failing"

    def __init__(self, message: str, fenced: bool = False) -> None:
        super().__init__(message)
        self.fenced = fenced


class WorkerUnusable(ElsewhereError):
    """An expert worker serves another model, other weights or another wire version: nothing can be sent there."""

    http_status = 503
    grpc_status = "FAILED_PRECONDITION"
    outcome = "worker_unusable"


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


# --- At the gateway -------------------------------------------------------------------------------------------


class RequestError(ClientError):
    """The client's request is not valid."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    outcome = "bad_request"


class RequestTooLarge(ClientError):
    """The client's request body is over the configured bound."""

    http_status = 413
    grpc_status = "INVALID_ARGUMENT"
    outcome = "too_large"


class UnsupportedEncoding(ClientError):
    """The client's body is in an encoding that this server does not read."""

    http_status = 415
    grpc_status = "INVALID_ARGUMENT"
    outcome = "unsupported_encoding"


class Unauthenticated(ClientError):
    """No API key, or one that nobody was given."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    outcome = "unauthenticated"


class PermissionDenied(ClientError):
    """The key's tenant may not use this model or this priority class."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    outcome = "forbidden"


class RequestTimeout(DeepsplitError):
    """The request was not answered within its deadline, and its generation was aborted."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    outcome = "request_timeout"


class ModelNotFound(ClientError):
    """The request names a model that is not served here."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    outcome = "model_not_found"


class ClientGone(DeepsplitError):
    """The client went away before its answer was whole: nobody is left to read it."""

    http_status = 499
    grpc_status = "CANCELLED"
    outcome = "cancelled"


class ReplicaUnavailable(ElsewhereError):
    """No attention replica can take the request, or the one that had it died."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    outcome = "replica_unavailable"


class EngineRefused(DeepsplitError):
    """The engine answered with an error of its own, in HTTP's terms: `status` and its text."""

    outcome = "engine_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineKilled(ClientError):
    """Two engines died while they computed this request: a third one is not risked."""

    http_status = 500
    grpc_status = "INTERNAL"
    outcome = "engine_killed"


class ReplicaLost(ReplicaUnavailable):
    """An attention replica died, hung or was cut off while it had the request."""


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

    `plane` names what limits, `reason` why.
    """

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    outcome = "refused"

    def __init__(
        self, message: str, *, retry_after_s: float, plane: Plane, reason: Reason, limits: RateLimits | None = None
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
