"""Tenants' budgets: requests and tokens per minute as token buckets that refill continuously, and streams at once.

A request reserves its prompt and its bound when it comes in, and is charged what it really took when it ends, however
it ends. A bucket may be overdrawn by requests that took more than they reserved: then the next one waits until that is
paid. No clock in here: `now_s` is passed in and never goes back.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass, field

from cluster.errors import Plane, QuotaExceeded, RateLimits, Reason
from routing.requests.request import Ask, Tenant

UNSTATED_NEW_TOKENS = 1024  # reserved per sequence if the client states no bound
_WINDOW_S = 60.0  # budgets are per minute, and a full bucket is one minute's
_MOST_TENANTS = 4096  # remembered; a tenant whose budgets are whole need not be
_ROUNDING = 1e-6


class Bucket:
    """A budget per minute. Kept as what is used of it, so that the limit may change at any time."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at_s = -math.inf

    def used(self, limit: float, now_s: float) -> float:
        """Used and not yet refilled; above `limit` if more was taken than reserved."""
        return max(0.0, self._used - limit / _WINDOW_S * max(0.0, now_s - self._at_s)) if self._used else 0.0

    def take(self, amount: float, limit: float, now_s: float) -> None:
        """Use `amount`, whether it is there or not; a negative one is given back. Never more than a full bucket."""
        self._used = max(0.0, self.used(limit, now_s) + amount)
        self._at_s = max(self._at_s, now_s)

    def seconds_until(self, amount: float, limit: float, now_s: float) -> float:
        """Until `amount` can be taken; one above the limit can be when the bucket is full, and overdraws it."""
        missing = self.used(limit, now_s) + min(amount, limit) - limit
        return 0.0 if missing <= _ROUNDING else missing / limit * _WINDOW_S


@dataclass
class _Account:
    """One tenant's."""

    tenant: Tenant
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    streams: int = 0
    # What the common admission has been told of the two, see `mark_told`.
    told_requests: Bucket = field(default_factory=Bucket)
    told_tokens: Bucket = field(default_factory=Bucket)


@dataclass(frozen=True)
class Spending:
    """What a tenant has used of its budgets and what has not yet been refilled."""

    tenant: Tenant
    requests: float
    tokens: float


class Quotas:
    """All tenants' accounts. Each `reserve`, `take` or `restore` is followed by one `commit` or `refund`."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._fraction = 1.0

    def set_fraction(self, fraction: float) -> None:
        """From now on these accounts may use this fraction of every limit: others use the rest."""
        self._fraction = fraction

    def reserve(self, ask: Ask, now_s: float, stream_ends_in_s: float = 1.0) -> QuotaExceeded | None:
        """Take what `ask` may use, or say why not, and then nothing is taken.

        `stream_ends_in_s`: about when one of the tenant's streams will end.
        """
        refusal = self._refusal(ask, self._account(ask.tenant, now_s), now_s, stream_ends_in_s)
        if refusal is None:
            self.take(ask, now_s)
        return refusal

    def take(self, ask: Ask, now_s: float) -> None:
        """Reserve for a request that was admitted elsewhere, whatever is left."""
        account = self._account(ask.tenant, now_s)
        self._take(account, 1, reservation(ask), now_s)
        account.streams += 1

    def restore(self, ask: Ask, now_s: float) -> None:
        """A request that already runs: its reservation is part of what was `add`ed."""
        self._account(ask.tenant, now_s).streams += 1

    def commit(self, ask: Ask, tokens: int, now_s: float) -> None:
        """The request ended and took `tokens`: all of them are charged."""
        account = self._account(ask.tenant, now_s)
        account.streams -= 1
        self._take(account, 0, tokens - reservation(ask), now_s)

    def refund(self, ask: Ask, now_s: float) -> None:
        """The request was refused or cancelled before it ran."""
        account = self._account(ask.tenant, now_s)
        account.streams -= 1
        self._take(account, -1, -reservation(ask), now_s)

    def limits(self, tenant: Tenant, now_s: float) -> RateLimits | None:
        """Where the tenant's budgets stand; None if it has none."""
        per_minute = (tenant.requests_per_minute, tenant.tokens_per_minute)
        if per_minute == (None, None):
            return None
        account = self._accounts.get(tenant.name) or _Account(tenant)
        requests = self._standing(account.requests, tenant.requests_per_minute, now_s)
        tokens = self._standing(account.tokens, tenant.tokens_per_minute, now_s)
        return RateLimits(*requests, *tokens)

    # --- handing accounts on ---

    def spending(self, now_s: float, since_told: bool) -> list[Spending]:
        """What has been used, reservations included; `since_told`: only what came after `mark_told`."""
        found = []
        for account in self._accounts.values():
            used = self._used(account.requests, account.tokens, account.tenant, now_s)
            told = self._used(account.told_requests, account.told_tokens, account.tenant, now_s)
            requests, tokens = (max(0.0, of - known * since_told) for of, known in zip(used, told, strict=True))
            if requests or tokens:
                found.append(Spending(account.tenant, requests, tokens))
        return found

    def add(self, spending: Spending, now_s: float) -> None:
        """This was used elsewhere; here it counts as well."""
        self._take(self._account(spending.tenant, now_s), spending.requests, spending.tokens, now_s)

    def mark_told(self, now_s: float) -> None:
        """All that has been used until now is known to the common admission."""
        for account in self._accounts.values():
            account.told_requests, account.told_tokens = copy.copy(account.requests), copy.copy(account.tokens)

    def untell(self, ask: Ask, tokens: int, now_s: float) -> None:
        """Of what this request reserved, the common admission has dropped `tokens` again."""
        account = self._account(ask.tenant, now_s)
        if (limit := self._limit(ask.tenant.tokens_per_minute)) is not None:
            account.told_tokens.take(-tokens, limit, now_s)

    # --- inside ---

    def _limit(self, per_minute: int | None) -> float | None:
        return None if per_minute is None else max(1.0, per_minute * self._fraction)

    def _take(self, account: _Account, requests: float, tokens: float, now_s: float) -> None:
        if (limit := self._limit(account.tenant.requests_per_minute)) is not None:
            account.requests.take(requests, limit, now_s)
        if (limit := self._limit(account.tenant.tokens_per_minute)) is not None:
            account.tokens.take(tokens, limit, now_s)

    def _used(self, requests: Bucket, tokens: Bucket, tenant: Tenant, now_s: float) -> tuple[float, float]:
        of_requests, of_tokens = self._limit(tenant.requests_per_minute), self._limit(tenant.tokens_per_minute)
        return (
            requests.used(of_requests, now_s) if of_requests else 0.0,
            tokens.used(of_tokens, now_s) if of_tokens else 0.0,
        )

    def _refusal(self, ask: Ask, account: _Account, now_s: float, stream_ends_in_s: float) -> QuotaExceeded | None:
        tenant = ask.tenant
        if tenant.max_streams is not None and account.streams >= max(1, int(tenant.max_streams * self._fraction)):
            what = f"has {account.streams} requests in flight, its limit (max_streams)"
            return self._exceeded(tenant, what, Reason.MAX_STREAMS, stream_ends_in_s, now_s)
        if (limit := self._limit(tenant.requests_per_minute)) is not None:
            wait_s = account.requests.seconds_until(1, limit, now_s)
            if wait_s > 0:
                what = f"has used its {limit:.0f} requests per minute"
                return self._exceeded(tenant, what, Reason.REQUESTS_PER_MINUTE, wait_s, now_s)
        if tenant.tokens_per_minute is not None and (limit := self._limit(tenant.tokens_per_minute)) is not None:
            amount = reservation(ask)
            if amount > tenant.tokens_per_minute:
                what = (
                    f"may use {tenant.tokens_per_minute} tokens per minute, and this request could take {amount} "
                    f"(about {ask.prompt_tokens} in its prompt): {_fix(ask, tenant.tokens_per_minute)}"
                )
                return self._exceeded(tenant, what, Reason.REQUEST_OVER_BUDGET, math.inf, now_s)
            wait_s = account.tokens.seconds_until(amount, limit, now_s)
            if wait_s > 0:
                what = f"has used its {limit:.0f} tokens per minute; this request could take {amount}"
                return self._exceeded(tenant, what, Reason.TOKENS_PER_MINUTE, wait_s, now_s)
        return None

    def _exceeded(self, tenant: Tenant, what: str, reason: Reason, retry_after_s: float, now_s: float) -> QuotaExceeded:
        return QuotaExceeded(
            f"tenant {tenant.name} {what}", retry_after_s=retry_after_s, plane=Plane.QUOTA, reason=reason,
            limits=self.limits(tenant, now_s),
        )  # fmt: skip

    def _standing(self, bucket: Bucket, per_minute: int | None, now_s: float) -> tuple[int | None, int | None, float]:
        """The limit, what remains of it, and seconds until it is whole."""
        limit = self._limit(per_minute)
        if limit is None:
            return None, None, 0.0
        used = bucket.used(limit, now_s)
        return int(limit), max(0, math.floor(limit - used + _ROUNDING)), used / limit * _WINDOW_S

    def _account(self, tenant: Tenant, now_s: float) -> _Account:
        known = self._accounts.pop(tenant.name, None)
        account = self._accounts[tenant.name] = known or _Account(tenant)
        account.tenant = tenant
        if known is None and len(self._accounts) > _MOST_TENANTS:
            self._forget_one(now_s)
        return account

    def _forget_one(self, now_s: float) -> None:
        """One whose budgets are whole; else the one that has asked for nothing for the longest time."""
        idle = None
        newest = next(reversed(self._accounts))
        for name, account in self._accounts.items():
            if account.streams or name == newest:
                continue
            if idle is None:
                idle = name
            if self._used(account.requests, account.tokens, account.tenant, now_s) == (0.0, 0.0):
                idle = name
                break
        if idle is not None:
            del self._accounts[idle]


def reservation(ask: Ask) -> int:
    """Tokens that are set aside for the request: its prompt and its bound. Where the client stated no bound, some
    tokens for each sequence, but no more than the tenant's budget holds.
    """
    if ask.bound_stated:
        return ask.prompt_tokens + ask.max_new_tokens
    new_tokens = min(ask.max_new_tokens, UNSTATED_NEW_TOKENS * ask.sequences)
    if ask.tenant.tokens_per_minute is not None:
        new_tokens = min(new_tokens, max(0, ask.tenant.tokens_per_minute - ask.prompt_tokens))
    return ask.prompt_tokens + new_tokens


def _fix(ask: Ask, limit: int) -> str:
    """What the client can do about a request that is larger than its budget."""
    room = limit - ask.prompt_tokens
    return f"set max_tokens to at most {room // max(1, ask.sequences)}" if room > 0 else "shorten the prompt"
