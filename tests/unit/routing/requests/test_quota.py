"""Tenants' budgets: what is reserved, given back and refilled, and what a refusal says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.requests import quota
from routing.requests.quota import Bucket, Quotas
from routing.requests.request import Ask, Priority, Tenant


def ask(tenant: Tenant, prompt_tokens: int = 10, new_tokens: int = 40, ticket: str = "t") -> Ask:
    return Ask(ticket, tenant, Priority.INTERACTIVE, prompt_tokens, new_tokens, 1, (), None)


def test_a_bucket_refills_continuously_and_not_beyond_its_limit() -> None:
    bucket = Bucket()
    bucket.take(60, 60, 0.0)
    assert bucket.used(60, 0.0) == 60
    assert bucket.used(60, 15.0) == pytest.approx(45)
    assert bucket.used(60, 59.0) == pytest.approx(1)
    assert bucket.used(60, 1000.0) == 0
    bucket.take(60, 60, 1000.0)
    assert bucket.seconds_until(1, 60, 1000.0) == pytest.approx(1)


def test_a_bucket_says_when_an_amount_can_be_taken() -> None:
    bucket = Bucket()
    assert bucket.seconds_until(60, 60, 5.0) == 0
    bucket.take(50, 60, 5.0)
    assert bucket.seconds_until(10, 60, 5.0) == 0
    assert bucket.seconds_until(25, 60, 5.0) == pytest.approx(15)
    assert bucket.seconds_until(25, 60, 20.0) == pytest.approx(0, abs=1e-6)
    assert bucket.seconds_until(61, 60, 5.0) == math.inf


def test_what_is_given_back_never_makes_more_than_a_full_bucket() -> None:
    bucket = Bucket()
    bucket.take(5, 60, 0.0)
    bucket.refund(50, 60, 0.0)
    assert bucket.used(60, 0.0) == 0


def test_time_that_went_back_refills_nothing() -> None:
    bucket = Bucket()
    bucket.take(60, 60, 10.0)
    assert bucket.used(60, 5.0) == 60
    assert bucket.used(60, 10.0) == 60


def test_a_changed_limit_counts_at_once() -> None:
    bucket = Bucket()
    bucket.take(60, 60, 0.0)
    assert bucket.seconds_until(60, 120, 0.0) == 0
    assert bucket.seconds_until(61, 120, 0.0) > 0
    assert bucket.seconds_until(20, 30, 0.0) > 60  # more is used than the new limit holds


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 100)), max_size=60))
def test_no_more_is_taken_in_a_time_than_a_full_bucket_and_the_refill(events: list[tuple[float, int]]) -> None:
    bucket, now_s, taken = Bucket(), 0.0, 0.0
    for pause_s, amount in events:
        now_s += pause_s
        if bucket.seconds_until(amount, 100, now_s) == 0:
            bucket.take(amount, 100, now_s)
            taken += amount
        assert taken <= 100 + 100 / 60 * now_s + 1e-3


@given(st.integers(1, 100), st.integers(1, 100), st.floats(0, 100))
def test_after_the_stated_wait_it_can_be_taken(used: int, amount: int, now_s: float) -> None:
    bucket = Bucket()
    bucket.take(used, 100, now_s)
    wait_s = bucket.seconds_until(amount, 100, now_s)
    assert bucket.seconds_until(amount, 100, now_s + wait_s) == 0


def test_who_has_no_limits_is_never_refused() -> None:
    quotas, tenant = Quotas(), Tenant("t")
    for number in range(1000):
        assert quotas.reserve(ask(tenant, 10**6, 10**6), 0.0) is None
        assert quotas.streams(tenant) == number + 1
    assert quotas.limits(tenant, 0.0) is None


def test_requests_per_minute() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=3)
    assert [quotas.reserve(ask(tenant), 0.0) for _ in range(3)] == [None] * 3
    refusal = quotas.reserve(ask(tenant), 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.plane) == ("requests_per_minute", "quota")
    assert refusal.retry_after_s == pytest.approx(20)
    assert "3 requests per minute" in str(refusal)
    assert quotas.reserve(ask(tenant), 20.0) is None
    assert quotas.reserve(ask(tenant), 20.0) is not None


def test_tokens_are_reserved_whole_and_the_unused_given_back() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=100)
    first, second = ask(tenant), ask(tenant)
    assert quotas.reserve(first, 0.0) is None
    assert quotas.reserve(second, 0.0) is None
    refusal = quotas.reserve(ask(tenant), 0.0)
    assert refusal is not None
    assert refusal.reason == "tokens_per_minute"
    assert refusal.retry_after_s == pytest.approx(30)
    quotas.commit(first, 20, 0.0)  # 30 of its 50 were not used
    assert quotas.reserve(ask(tenant, 10, 20), 0.0) is None
    assert quotas.reserve(ask(tenant, 1, 1), 0.0) is not None


def test_a_refused_reservation_takes_nothing() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=10, tokens_per_minute=100)
    for _ in range(20):
        assert quotas.reserve(ask(tenant, 50, 51), 0.0) is not None
    assert quotas.streams(tenant) == 0
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.remaining_requests, limits.remaining_tokens) == (10, 100)


def test_what_is_given_back_counts_as_never_asked() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1, tokens_per_minute=50, max_streams=1)
    for _ in range(5):
        assert quotas.reserve(ask(tenant), 0.0) is None
        quotas.refund(ask(tenant), 0.0)
    assert quotas.streams(tenant) == 0


def test_an_ended_request_still_counts_as_a_request() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1)
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 0, 0.0)
    assert quotas.reserve(ask(tenant), 0.0) is not None


def test_more_than_was_reserved_is_charged_up_to_as_much_again() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=1000)
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 70, 0.0)
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert limits.remaining_tokens == 930
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 10**6, 0.0)
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert limits.remaining_tokens == 830


@pytest.mark.parametrize(("prompt_tokens", "fix"), [(40, "max_tokens to at most 60"), (200, "shorten the prompt")])
def test_what_can_never_be_served_says_so_and_how_to_fix_it(prompt_tokens: int, fix: str) -> None:
    tenant = Tenant("t", tokens_per_minute=100)
    refusal = Quotas().reserve(ask(tenant, prompt_tokens, 70), 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == math.inf
    assert refusal.reason == "request_over_budget"
    assert fix in str(refusal)


def test_max_streams_bounds_those_in_flight() -> None:
    quotas, tenant = Quotas(), Tenant("t", max_streams=2)
    assert quotas.reserve(ask(tenant), 0.0) is None
    assert quotas.reserve(ask(tenant), 0.0) is None
    refusal = quotas.reserve(ask(tenant), 0.0, stream_ends_in_s=7.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("max_streams", 7.0)
    quotas.commit(ask(tenant), 50, 0.0)
    assert quotas.reserve(ask(tenant), 0.0) is None


def test_what_already_runs_is_taken_beyond_every_limit() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1, tokens_per_minute=50, max_streams=1)
    for _ in range(3):
        quotas.restore(ask(tenant), 0.0)
    assert quotas.streams(tenant) == 3
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.remaining_requests, limits.remaining_tokens) == (0, 0)
    assert limits.reset_tokens_s == pytest.approx(180)


def test_limits_tell_what_remains_and_when_it_is_whole() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=6, tokens_per_minute=600)
    assert quotas.reserve(ask(tenant), 0.0) is None
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.limit_requests, limits.remaining_requests, limits.reset_requests_s) == (6, 5, pytest.approx(10))
    assert (limits.limit_tokens, limits.remaining_tokens, limits.reset_tokens_s) == (600, 550, pytest.approx(5))
    only_tokens = quotas.limits(Tenant("u", tokens_per_minute=9), 0.0)
    assert only_tokens is not None
    assert (only_tokens.limit_requests, only_tokens.remaining_requests) == (None, None)
    assert (only_tokens.limit_tokens, only_tokens.remaining_tokens) == (9, 9)


def test_a_refusal_carries_the_limits() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1)
    assert quotas.reserve(ask(tenant), 0.0) is None
    refusal = quotas.reserve(ask(tenant), 0.0)
    assert refusal is not None
    assert refusal.limits is not None
    assert refusal.limits.remaining_requests == 0


def test_tenants_do_not_share_budgets() -> None:
    quotas = Quotas()
    one, other = Tenant("one", requests_per_minute=1), Tenant("other", requests_per_minute=1)
    assert quotas.reserve(ask(one), 0.0) is None
    assert quotas.reserve(ask(other), 0.0) is None
    assert quotas.reserve(ask(one), 0.0) is not None


def test_tenants_with_used_budgets_or_streams_are_remembered_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_MOST_TENANTS", 3)
    quotas = Quotas()
    streaming, spent = Tenant("streaming", max_streams=1), Tenant("spent", requests_per_minute=1)
    assert quotas.reserve(ask(streaming), 0.0) is None
    assert quotas.reserve(ask(spent), 0.0) is None
    quotas.commit(ask(spent), 50, 0.0)
    for number in range(50):
        whole = Tenant(f"whole {number}", tokens_per_minute=50)
        assert quotas.reserve(ask(whole), 0.0) is None
        quotas.commit(ask(whole), 0, 0.0)
    assert quotas.reserve(ask(streaming), 0.0) is not None
    assert quotas.reserve(ask(spent), 0.0) is not None
