"""What waiting rooms tell deciders, and gateways and the common admission each other: one msgpack message per gRPC
message, nothing pickled.
"""

from __future__ import annotations

import msgspec

from cluster.errors import NoCapacity, Overloaded, Plane, QuotaExceeded, RateLimits, Reason, Refusal
from routing.requests.admission import Admitted, Decision, Refused
from routing.requests.quota import Spending
from routing.requests.request import Ask, Grant, Usage

SERVICE = "deepsplit.admission.v1.Admission"
METHOD = "Decide"
TOKEN_KEY = "deepsplit-admission-token"
# A server that is hung or cut off is given up after interval + timeout; meanwhile its clients wait.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]

_REFUSALS: dict[str, type[Refusal]] = {kind.__name__: kind for kind in (QuotaExceeded, Overloaded, NoCapacity)}


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A new request."""

    ask: Ask


class Restore(msgspec.Struct, frozen=True, tag=True):
    """A request that already runs; the sender was alone until now."""

    ask: Ask
    replica_id: str
    generated_tokens: int


class Spent(msgspec.Struct, frozen=True, tag=True):
    """What a tenant used up that the receiver does not know of."""

    spending: Spending


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """A waiting client went away."""

    ticket: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many tokens have been generated; the first such event says when the first token came."""

    ticket: str
    generated_tokens: int


class Move(msgspec.Struct, frozen=True, tag=True):
    """The request's replica was lost."""

    ticket: str


class Finish(msgspec.Struct, frozen=True, tag=True):
    """The request ended."""

    ticket: str
    usage: Usage


class Granted(msgspec.Struct, frozen=True, tag=True):
    """Leave to run."""

    grant: Grant


class Denied(msgspec.Struct, frozen=True, tag=True):
    """A refusal."""

    ticket: str
    kind: str
    message: str
    retry_after_s: float
    plane: Plane
    reason: Reason
    limits: RateLimits | None


Event = Submit | Restore | Cancel | Progress | Move | Finish
_events = msgspec.msgpack.Decoder(Event | Spent)
_answers = msgspec.msgpack.Decoder(Granted | Denied)
encode_event = msgspec.msgpack.Encoder().encode


def decode_event(message: bytes) -> Event | Spent:
    """What a gateway told. Raises msgspec.DecodeError."""
    event: Event | Spent = _events.decode(message)
    return event


def encode_decision(decision: Decision) -> bytes:
    """A decision on its way to its gateway."""
    if isinstance(decision, Admitted):
        return encode_event(Granted(decision.grant))
    refusal = decision.refusal
    return encode_event(
        Denied(
            decision.ticket, type(refusal).__name__, str(refusal), refusal.retry_after_s, refusal.plane,
            refusal.reason, refusal.limits,
        )
    )  # fmt: skip


def decode_decision(message: bytes) -> Decision:
    """What the common admission decided. Raises msgspec.DecodeError."""
    answer: Granted | Denied = _answers.decode(message)
    if isinstance(answer, Granted):
        return Admitted(answer.grant)
    kind = _REFUSALS.get(answer.kind, Overloaded)
    refusal = kind(
        answer.message, retry_after_s=answer.retry_after_s, plane=answer.plane, reason=answer.reason,
        limits=answer.limits,
    )  # fmt: skip
    return Refused(answer.ticket, refusal)
