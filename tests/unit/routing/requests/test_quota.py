"""Tenants' budgets: what is reserved, given back and refilled, and what a refusal says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.requests import quota
from routing.requests.quota import UNSTATED_NEW_TOKENS, Bucket, Quotas, reservation
from routing.requests.request import Ask, Priority, Tenant
from tests.unit.routing.requests.quotas import streams_of


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
    assert bucket.seconds_until(61, 60, 5.0) == pytest.approx(50)  # once it is whole, and overdraws it


def test_what_is_given_back_never_makes_more_than_a_full_bucket() -> None:
    bucket = Bucket()
    bucket.take(5, 60, 0.0)
    bucket.take(-50, 60, 0.0)
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
        assert streams_of(quotas, tenant) == number + 1
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
    assert streams_of(quotas, tenant) == 0
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.remaining_requests, limits.remaining_tokens) == (10, 100)


def test_what_is_given_back_counts_as_never_asked() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1, tokens_per_minute=50, max_streams=1)
    for _ in range(5):
        assert quotas.reserve(ask(tenant), 0.0) is None
        quotas.refund(ask(tenant), 0.0)
    assert streams_of(quotas, tenant) == 0


def test_an_ended_request_still_counts_as_a_request() -> None:
    quotas, tenant = Quotas(), Tenant("t", requests_per_minute=1)
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 0, 0.0)
    assert quotas.reserve(ask(tenant), 0.0) is not None


def test_more_than_was_reserved_is_charged_and_the_next_request_waits_until_it_is_paid() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=1000)
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 70, 0.0)
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert limits.remaining_tokens == 930
    assert quotas.reserve(ask(tenant), 0.0) is None
    quotas.commit(ask(tenant), 5_000, 0.0)
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.remaining_tokens, limits.reset_tokens_s) == (0, pytest.approx(5_070 / 1_000 * 60))
    refusal = quotas.reserve(ask(tenant), 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(4_120 / 1_000 * 60)
    assert quotas.reserve(ask(tenant), refusal.retry_after_s - 0.1) is not None
    assert quotas.reserve(ask(tenant), refusal.retry_after_s) is None


def open_ask(tenant: Tenant, sequences: int = 1, prompt_tokens: int = 10) -> Ask:
    """The client states no bound: it is whatever the context allows."""
    return Ask("t", tenant, Priority.INTERACTIVE, prompt_tokens, 131_072, sequences, (), None, bound_stated=False)


def test_an_unstated_bound_reserves_some_tokens_per_sequence_and_never_more_than_the_budget() -> None:
    assert reservation(open_ask(Tenant("t"))) == 10 + UNSTATED_NEW_TOKENS
    assert reservation(open_ask(Tenant("t"), sequences=3)) == 10 + 3 * UNSTATED_NEW_TOKENS
    assert reservation(open_ask(Tenant("t", tokens_per_minute=500))) == 500
    assert reservation(open_ask(Tenant("t", tokens_per_minute=500), prompt_tokens=600)) == 600


def test_a_budget_smaller_than_what_an_unstated_bound_reserves_is_still_served() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=500)
    assert quotas.reserve(open_ask(tenant), 0.0) is None
    refusal = quotas.reserve(open_ask(tenant), 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("tokens_per_minute", pytest.approx(60))
    never = quotas.reserve(open_ask(tenant, prompt_tokens=501), 0.0)
    assert never is not None
    assert (never.reason, never.retry_after_s) == ("request_over_budget", math.inf)


_REQUESTS = st.tuples(
    st.floats(0, 5),  # seconds since the last one
    st.integers(1, 3_000),  # prompt
    st.integers(0, 20_000),  # generated
    st.booleans(),  # its bound is stated
    st.integers(0, 2),  # how many of those that run end then
)


@given(st.lists(_REQUESTS, max_size=60))
def test_a_budget_bounds_what_is_spent_up_to_the_overrun_of_those_that_run(
    requests: list[tuple[float, int, int, bool, int]],
) -> None:
    quotas, tenant, now_s = Quotas(), Tenant("t", tokens_per_minute=10_000), 0.0
    spent = overrun = 0  # `overrun`: by those that ended since the last one was let in
    running: list[tuple[Ask, int]] = []
    for pause_s, prompt, generated, stated, ends in requests:
        now_s += pause_s
        one = Ask("t", tenant, Priority.INTERACTIVE, prompt, 700 if stated else 131_072, 1, (), None, stated)
        if quotas.reserve(one, now_s) is None:
            overrun = 0
            running.append((one, prompt + (min(700, generated) if stated else generated)))
        for _ in range(min(ends, len(running))):
            done, tokens = running.pop(0)
            quotas.commit(done, tokens, now_s)
            spent += tokens
            overrun += max(0, tokens - reservation(done))
        reserved = sum(reservation(one) for one, _ in running)
        assert spent + reserved <= 10_000 + 10_000 / 60 * now_s + overrun + 1e-3


def test_a_request_that_generates_nothing_is_charged_its_prompt() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=1_000)
    one = Ask("t", tenant, Priority.INTERACTIVE, 900, 0, 0, (), None)
    assert quotas.reserve(one, 0.0) is None
    assert quotas.reserve(one, 0.0) is not None
    quotas.commit(one, 300, 0.0)  # counted exactly
    limits = quotas.limits(tenant, 0.0)
    assert limits is not None
    assert limits.remaining_tokens == 700


# --- several gateways ---


def test_a_part_of_a_budget_refuses_for_a_while_what_only_the_whole_one_holds() -> None:
    quotas, tenant = Quotas(), Tenant("t", tokens_per_minute=1_000)
    quotas.set_fraction(0.25)
    large = ask(tenant, 10, 600)
    assert quotas.reserve(large, 0.0) is None  # overdraws this part, which pays for it
    quotas.commit(large, 610, 0.0)
    refusal = quotas.reserve(large, 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("tokens_per_minute", pytest.approx(610 / 250 * 60))
    assert quotas.reserve(large, refusal.retry_after_s) is None
    never = quotas.reserve(ask(tenant, 10, 1_000), 0.0)
    assert never is not None
    assert (never.reason, never.retry_after_s) == ("request_over_budget", math.inf)


def spent(quotas: Quotas, now_s: float, since_told: bool) -> tuple[float, float]:
    """Requests and tokens of the only tenant."""
    found = quotas.spending(now_s, since_told)
    assert len(found) <= 1
    return (found[0].requests, found[0].tokens) if found else (0.0, 0.0)


def test_spending_is_handed_on_and_what_is_known_is_not_told_again() -> None:
    tenant = Tenant("t", requests_per_minute=60, tokens_per_minute=600)
    mine, common = Quotas(), Quotas()
    before, after = ask(tenant, 50, 100), ask(tenant, 20, 0)
    mine.take(before, 0.0)
    mine.mark_told(0.0)
    mine.untell(before, 90, 0.0)  # the common admission charged the prompt and ten tokens, and dropped the rest
    mine.take(after, 0.0)
    assert spent(mine, 0.0, since_told=True) == (1.0, pytest.approx(110))
    assert spent(mine, 0.0, since_told=False) == (2.0, pytest.approx(170))
    for one in mine.spending(0.0, since_told=False):
        common.add(one, 0.0)
    common.restore(before, 0.0)
    common.commit(before, 60, 0.0)
    assert streams_of(common, tenant) == 0
    limits = common.limits(tenant, 0.0)
    assert limits is not None
    assert (limits.remaining_requests, limits.remaining_tokens) == (58, 520)


def test_what_was_told_is_the_first_to_be_refilled() -> None:
    tenant = Tenant("t", tokens_per_minute=600)
    quotas = Quotas()
    quotas.take(ask(tenant, 100, 0), 0.0)
    quotas.mark_told(0.0)
    quotas.take(ask(tenant, 100, 0), 5.0)
    assert spent(quotas, 5.0, since_told=True)[1] == pytest.approx(100)
    assert spent(quotas, 10.0, since_told=True)[1] == pytest.approx(100)
    assert spent(quotas, 15.0, since_told=True)[1] == pytest.approx(50)
    assert quotas.spending(20.1, since_told=True) == []


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
        quotas.take(ask(tenant), 0.0)
    assert streams_of(quotas, tenant) == 3
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
