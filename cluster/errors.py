"""The one error tree. Each leaf has one HTTP status, one gRPC status name and one metric outcome.

Exceptions are for other people's mistakes (input, peers, machines); our own mistakes are asserts.
"""

from __future__ import annotations

from typing import ClassVar


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
