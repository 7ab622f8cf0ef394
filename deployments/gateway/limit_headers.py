"""A tenant's budgets and a refusal's advice as headers: HTTP headers, and gRPC metadata of the same names."""

from __future__ import annotations

import math
import random

from cluster.errors import ClientError, DeepsplitError, RateLimits, Refusal, ReplicaUnavailable, RequestTimeout

RETRY_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{fact}-{what}" for fact in ("limit", "remaining", "reset") for what in ("requests", "tokens")
)
_RETRY_LOST_S = 1.0  # to half as much again


def rate_limit_headers(limits: RateLimits | None) -> dict[str, str]:
    """`x-ratelimit-*` as OpenAI sends them: limit, what is left, and when it is whole again, such as `1.5s`."""
    headers: dict[str, str] = {}
    if limits is None:
        return headers
    facts: tuple[tuple[str, int | None, int | None, float], ...] = (
        ("requests", limits.limit_requests, limits.remaining_requests, limits.reset_requests_s),
        ("tokens", limits.limit_tokens, limits.remaining_tokens, limits.reset_tokens_s),
    )
    for what, limit, remaining, reset_s in facts:
        if limit is not None:
            headers |= {
                f"x-ratelimit-limit-{what}": str(limit),
                f"x-ratelimit-remaining-{what}": str(max(0, remaining or 0)),
                f"x-ratelimit-reset-{what}": f"{reset_s:.1f}s",
            }
    return headers


def retry_headers(error: DeepsplitError) -> dict[str, str]:
    """When to ask again: `retry-after` for everybody, and what OpenAI's clients prefer to it.

    `x-should-retry: false` where their rule (again after 429 and 5xx) would only do harm.
    """
    if isinstance(error, Refusal):
        if math.isinf(error.retry_after_s):
            return rate_limit_headers(error.limits) | {"x-should-retry": "false"}
        return rate_limit_headers(error.limits) | _after(error.retry_after_s)
    if isinstance(error, ReplicaUnavailable):
        return _after(_RETRY_LOST_S * (1 + 0.5 * random.random()))
    return {"x-should-retry": "false"} if isinstance(error, ClientError | RequestTimeout) else {}


def _after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1000))}
