"""Tenants' budgets: requests and tokens per minute as token buckets that refill continuously, and streams at once.

A request reserves its whole prompt and `max_new_tokens` when it comes in; what it did not use is given back when it
ends. No clock in here: `now_s` is passed in and never goes back.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from cluster.errors import Plane, QuotaExceeded, RateLimits, Reason
from routing.requests.request import Ask, Tenant

_WINDOW_S = 60.0  # budgets are per minute, and a full bucket is one minute's
_MOST_TENANTS = 4096  # remembered; a tenant whose budgets are whole need not be
_ROUNDING = 1e-6


class Bucket:
    """A budget per minute. Kept as what is used of it, so that the limit may change at any time."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at_s = -math.inf

    def used(self, limit: int, now_s: float) -> float:
        """Used and not yet refilled; above `limit` if more was taken than reserved."""
        if self._used:
            self._used = max(0.0, self._used - limit / _WINDOW_S * max(0.0, now_s - self._at_s))
        self._at_s = max(self._at_s, now_s)
        return self._used

    def take(self, amount: float, limit: int, now_s: float) -> None:
        """Use `amount`, whether it is there or not."""
        self._used = self.used(limit, now_s) + amount

    def refund(self, amount: float, limit: int, now_s: float) -> None:
        """Never more than a full bucket."""
        self._used = max(0.0, self.used(limit, now_s) - amount)

    def seconds_until(self, amount: float, limit: int, now_s: float) -> float:
        """Until `amount` can be taken; infinite if the full bucket holds less."""
        if amount > limit:
            return math.inf
        missing = self.used(limit, now_s) + amount - limit
        return 0.0 if missing <= _ROUNDING else missing / limit * _WINDOW_S


@dataclass
class _Account:
    """One tenant's."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    streams: int = 0

    def is_whole(self, tenant: Tenant, now_s: float) -> bool:
        """Whether forgetting it changes nothing."""
        used = self.requests.used(tenant.requests_per_minute or 0, now_s)
        return not (self.streams or used or self.tokens.used(tenant.tokens_per_minute or 0, now_s))


class Quotas:
    """All tenants' accounts. Each `reserve` or `restore` is followed by one `commit` or `refund` for the same ask."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, tuple[_Account, Tenant]] = OrderedDict()

    def reserve(self, ask: Ask, now_s: float, stream_ends_in_s: float = 1.0) -> QuotaExceeded | None:
        """Take what `ask` may use, or say why not, and then nothing is taken.

        `stream_ends_in_s`: about when one of the tenant's streams will end.
        """
        tenant = ask.tenant
        account = self._account(tenant, now_s)
        refusal = self._refusal(ask, account, now_s, stream_ends_in_s)
        if refusal is None:
            self._take(ask, account, now_s)
        return refusal

    def restore(self, ask: Ask, now_s: float) -> None:
        """Reserve for a request that already runs, whatever is left."""
        self._take(ask, self._account(ask.tenant, now_s), now_s)

    def commit(self, ask: Ask, tokens: int, now_s: float) -> None:
        """The request ended and took `tokens`. More than it had reserved is charged, up to as much again."""
        account = self._account(ask.tenant, now_s)
        account.streams -= 1
        limit = ask.tenant.tokens_per_minute
        if limit is None:
            return
        unused = reservation(ask) - tokens
        if unused >= 0:
            account.tokens.refund(unused, limit, now_s)
        else:
            account.tokens.take(min(-unused, reservation(ask)), limit, now_s)

    def refund(self, ask: Ask, now_s: float) -> None:
        """The request was refused or withdrawn before it ran."""
        account = self._account(ask.tenant, now_s)
        account.streams -= 1
        if ask.tenant.requests_per_minute is not None:
            account.requests.refund(1, ask.tenant.requests_per_minute, now_s)
        if ask.tenant.tokens_per_minute is not None:
            account.tokens.refund(reservation(ask), ask.tenant.tokens_per_minute, now_s)

    def limits(self, tenant: Tenant, now_s: float) -> RateLimits | None:
        """Where the tenant's budgets stand; None if it has none."""
        per_minute = (tenant.requests_per_minute, tenant.tokens_per_minute)
        if per_minute == (None, None):
            return None
        account = self._account(tenant, now_s)
        buckets = zip((account.requests, account.tokens), per_minute, strict=True)
        requests, tokens = (_standing(bucket, limit, now_s) for bucket, limit in buckets)
        return RateLimits(per_minute[0], *requests, per_minute[1], *tokens)

    def streams(self, tenant: Tenant) -> int:
        """The tenant's requests in flight, waiting ones included."""
        known = self._accounts.get(tenant.name)
        return known[0].streams if known else 0

    def _take(self, ask: Ask, account: _Account, now_s: float) -> None:
        account.streams += 1
        if ask.tenant.requests_per_minute is not None:
            account.requests.take(1, ask.tenant.requests_per_minute, now_s)
        if ask.tenant.tokens_per_minute is not None:
            account.tokens.take(reservation(ask), ask.tenant.tokens_per_minute, now_s)

    def _refusal(
        self, ask: Ask, account: _Account, now_s: float, stream_ends_in_s: float
    ) -> QuotaExceeded | None:  # fmt: skip
        tenant = ask.tenant
        if tenant.max_streams is not None and account.streams >= tenant.max_streams:
            what = f"has {account.streams} requests in flight, its limit (max_streams)"
            return self._exceeded(tenant, what, Reason.MAX_STREAMS, stream_ends_in_s, now_s)
        if (limit := tenant.requests_per_minute) is not None:
            wait_s = account.requests.seconds_until(1, limit, now_s)
            if wait_s > 0:
                what = f"has used its {limit} requests per minute"
                return self._exceeded(tenant, what, Reason.REQUESTS_PER_MINUTE, wait_s, now_s)
        if (limit := tenant.tokens_per_minute) is not None:
            amount = reservation(ask)
            wait_s = account.tokens.seconds_until(amount, limit, now_s)
            if wait_s == math.inf:
                room = limit - ask.prompt_tokens
                fix = f"set max_tokens to at most {room}" if room > 0 else "shorten the prompt"
                what = (
                    f"may use {limit} tokens per minute, and this request could take {amount} (about "
                    f"{ask.prompt_tokens} in its prompt, up to {ask.max_new_tokens} new ones): {fix}"
                )
                return self._exceeded(tenant, what, Reason.REQUEST_OVER_BUDGET, wait_s, now_s)
            if wait_s > 0:
                what = f"has used its {limit} tokens per minute; this request could take {amount}"
                return self._exceeded(tenant, what, Reason.TOKENS_PER_MINUTE, wait_s, now_s)
        return None

    def _exceeded(self, tenant: Tenant, what: str, reason: Reason, retry_after_s: float, now_s: float) -> QuotaExceeded:
        return QuotaExceeded(
            f"tenant {tenant.name} {what}", retry_after_s=retry_after_s, plane=Plane.QUOTA, reason=reason,
            limits=self.limits(tenant, now_s),
        )  # fmt: skip

    def _account(self, tenant: Tenant, now_s: float) -> _Account:
        known = self._accounts.pop(tenant.name, None)
        account = known[0] if known else _Account()
        self._accounts[tenant.name] = (account, tenant)
        if known is None and len(self._accounts) > _MOST_TENANTS:
            self._forget_one(now_s)
        return account

    def _forget_one(self, now_s: float) -> None:
        """One whose budgets are whole; else the one that has asked for nothing for the longest time."""
        idle = None
        for name, (account, tenant) in self._accounts.items():
            if account.is_whole(tenant, now_s) and name != next(reversed(self._accounts)):
                idle = name
                break
            if idle is None and not account.streams:
                idle = name
        if idle is not None:
            del self._accounts[idle]


def reservation(ask: Ask) -> int:
    """Tokens that the request may use at most."""
    return ask.prompt_tokens + ask.max_new_tokens


def _standing(bucket: Bucket, limit: int | None, now_s: float) -> tuple[int | None, float]:
    """What remains, and seconds until it is whole."""
    if limit is None:
        return None, 0.0
    used = bucket.used(limit, now_s)
    return max(0, math.floor(limit - used + _ROUNDING)), used / limit * _WINDOW_S
