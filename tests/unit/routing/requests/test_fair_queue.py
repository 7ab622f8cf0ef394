"""Start-time fair queuing: order, shares, and what removals, moves and final costs change."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.requests.fair_queue import FairQueue
from routing.requests.request import Ask, Priority, Tenant
from routing.requests.ticket import Ticket

A, B, HEAVY = Tenant("a"), Tenant("b"), Tenant("heavy", weight=2.0)
_numbers = count()


def ticket(tenant: Tenant, cost: float = 10.0, sequences: int = 1, kv_tokens: int = 10) -> Ticket:
    number = next(_numbers)
    ask = Ask(str(number), tenant, Priority.BATCH, 5, 5, sequences, (), None)
    return Ticket(ask, number, 0.0, 1.0, 0.1, cost, sequences, kv_tokens, 5.0)


def pushed(queue: FairQueue, tenant: Tenant, cost: float = 10.0, sequences: int = 1) -> Ticket:
    one = ticket(tenant, cost, sequences)
    queue.push(one)
    return one


def start_first(queue: FairQueue) -> Ticket:
    first = next(iter(queue))
    queue.start(first)
    return first


def test_one_tenants_requests_go_in_order_of_arrival() -> None:
    queue = FairQueue()
    tickets = [pushed(queue, A, cost) for cost in (30, 1, 20)]
    assert list(queue) == tickets


def test_equal_tenants_alternate_however_much_each_has_waiting() -> None:
    queue = FairQueue()
    of_a = [pushed(queue, A) for _ in range(4)]
    of_b = [pushed(queue, B) for _ in range(2)]
    assert list(queue) == [of_a[0], of_b[0], of_a[1], of_b[1], of_a[2], of_a[3]]


@pytest.mark.parametrize(("costs", "shares"), [((10, 10), (1, 2)), ((40, 10), (1, 2)), ((10, 70), (1, 2))])
def test_costs_are_shared_by_weight(costs: tuple[float, float], shares: tuple[float, float]) -> None:
    queue = FairQueue()
    for _ in range(500):
        pushed(queue, A, costs[0])
        pushed(queue, HEAVY, costs[1])
    served: Counter[str] = Counter()
    while sum(served.values()) < 4_000:
        one = start_first(queue)
        served[one.ask.tenant.name] += int(one.cost)
    assert served["heavy"] / served["a"] == pytest.approx(shares[1] / shares[0], rel=0.1)


def test_who_was_idle_starts_level_with_the_others() -> None:
    queue = FairQueue()
    for _ in range(100):
        pushed(queue, A)
    for _ in range(50):
        start_first(queue)
    late = [pushed(queue, B) for _ in range(3)]
    order = list(queue)
    assert order.index(late[0]) <= 1  # no debt ...
    assert order.index(late[1]) >= 2  # ... and no credit for the time when it asked for nothing
    assert order.index(late[2]) >= 4


def test_who_was_served_alone_owes_nothing_later() -> None:
    queue = FairQueue()
    for _ in range(100):
        pushed(queue, A)
        start_first(queue)
    first = pushed(queue, A)
    of_b = pushed(queue, B)
    assert next(iter(queue)) in (first, of_b)
    assert queue.next_tag(B) - queue.next_tag(A) <= 10


def test_a_removed_requests_successors_move_up() -> None:
    queue = FairQueue()
    of_a = [pushed(queue, A) for _ in range(3)]
    of_b = [pushed(queue, B) for _ in range(3)]
    next_tag = queue.next_tag(A)
    queue.remove(of_a[0])
    assert queue.next_tag(A) == next_tag - 10
    assert list(queue) == [of_a[1], of_b[0], of_a[2], of_b[1], of_b[2]]
    queue.remove(of_a[2])
    assert list(queue) == [of_a[1], *of_b]
    assert pushed(queue, A).tag == 10


def test_removing_all_leaves_nothing() -> None:
    queue = FairQueue()
    for one in [pushed(queue, tenant, 7.0, sequences=2) for tenant in (A, B, HEAVY, A, B)]:
        queue.remove(one)
    assert (len(queue), queue.slots, queue.kv_tokens) == (0, 0, 0)
    assert [queue.next_tag(tenant) for tenant in (A, B, HEAVY)] == [0, 0, 0]


def test_one_that_was_moved_goes_before_all_and_is_not_charged_again() -> None:
    queue = FairQueue()
    running = pushed(queue, A)
    start_first(queue)
    waiting = pushed(queue, B)
    next_tag = queue.next_tag(A)
    queue.push_front(running)
    assert list(queue) == [running, waiting]
    assert queue.before(-math.inf, math.inf) == (1, 10)
    assert queue.next_tag(A) == next_tag
    assert start_first(queue) is running
    assert queue.next_tag(A) == next_tag
    queue.push_front(running)
    queue.remove(running)
    assert queue.next_tag(A) == next_tag


def test_moved_ones_keep_their_order_of_arrival() -> None:
    queue = FairQueue()
    tickets = [pushed(queue, A) for _ in range(3)]
    for one in tickets:
        queue.start(one)
    for one in reversed(tickets):
        queue.push_front(one)
    assert list(queue) == tickets


def test_the_last_one_is_the_most_over_served_tenants_latest() -> None:
    queue = FairQueue()
    assert queue.last() is None
    of_a = [pushed(queue, A) for _ in range(3)]
    pushed(queue, B)
    assert queue.last() is of_a[-1]
    for one in list(queue):
        queue.start(one)
    queue.push_front(of_a[0])
    assert queue.last() is None  # it ran already: nobody displaces it
    of_b = pushed(queue, B)
    assert queue.last() is of_b


def test_what_goes_before_a_tag() -> None:
    queue = FairQueue()
    pushed(queue, A, 10.0, sequences=2)
    pushed(queue, A, 10.0, sequences=3)
    assert queue.before(queue.next_tag(B), math.inf) == (2, 10)
    assert queue.before(queue.next_tag(A), math.inf) == (5, 20)
    assert (queue.slots, queue.kv_tokens) == (5, 20)
    pushed(queue, A, 10.0)
    assert queue.before(math.inf, 2) == (3, 20)  # the one of three slots is passed


def test_a_request_that_cost_less_than_charged_is_paid_back() -> None:
    queue = FairQueue()
    pushed(queue, A, 100.0)
    pushed(queue, B, 10.0)
    start_first(queue)
    start_first(queue)
    queue.correct_cost(A, 100.0, 10.0)
    assert queue.next_tag(A) == queue.next_tag(B) == 10


def test_paying_back_lets_no_request_pass_its_tenants_earlier_ones() -> None:
    queue = FairQueue()
    pushed(queue, A, 100.0)
    start_first(queue)
    earlier = [pushed(queue, A, 10.0) for _ in range(3)]
    queue.correct_cost(A, 100.0, 1.0)
    later = pushed(queue, A, 10.0)
    assert list(queue) == [*earlier, later]
    queue.remove(earlier[0])
    assert list(queue) == [*earlier[1:], later]


def test_overtakers_are_what_others_will_ask_for_up_to_their_share() -> None:
    queue = FairQueue()
    for tenth in range(200):
        queue.note_demand(B, 1, 0.1 * tenth)
    queue.note_demand(A, 1, 20.0)
    for _ in range(20):
        pushed(queue, A)
    tag = queue.next_tag(A)
    few, many = (queue.overtakers(A, tag, within_s, 20.0) for within_s in (1.0, 1000.0))
    assert few == pytest.approx(10, rel=0.2)  # ten per second
    assert few < many < 250  # virtual time is behind by 20 requests of A's: that much room B has
    assert queue.overtakers(A, tag, 0.0, 20.0) == 0
    assert queue.overtakers(B, queue.next_tag(B), 1000.0, 20.0) == 0
    assert queue.demand_per_s(20.0) == pytest.approx(10, rel=0.2)


def test_forgotten_tenants_are_those_without_waiting_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routing.requests.fair_queue._MOST_FLOWS", 4)
    queue = FairQueue()
    waiting = [pushed(queue, A), pushed(queue, A)]
    for number in range(30):
        queue.note_demand(Tenant(f"idle {number}"), 1, 0.0)
    assert queue.next_tag(A) == 20
    for one in waiting:
        queue.remove(one)
    assert (len(queue), queue.slots, queue.kv_tokens) == (0, 0, 0)


@given(st.randoms(use_true_random=False), st.integers(1, 80))
def test_any_sequence_keeps_sums_and_each_tenants_order(rng: random.Random, length: int) -> None:
    queue, started = FairQueue(), []
    for _ in range(length):
        waiting = list(queue)
        what = rng.choice(["push", "push", "start", "remove", "settle", "front"])
        if what == "push":
            pushed(queue, rng.choice([A, B, HEAVY]), rng.uniform(1, 50), rng.randint(1, 3))
        elif what == "start" and waiting:
            started.append(start_first(queue))
        elif what == "remove" and waiting:
            queue.remove(rng.choice(waiting))
        elif started:
            one = started.pop(rng.randrange(len(started)))
            if what == "front":
                queue.push_front(one)
            else:
                queue.correct_cost(one.ask.tenant, one.cost, rng.uniform(0.1, 2) * one.cost)
        waiting = list(queue)
        assert len(queue) == len(waiting)
        assert queue.slots == sum(one.slots for one in waiting)
        assert queue.kv_tokens == sum(one.kv_tokens for one in waiting)
        assert [one.tag for one in waiting] == sorted(one.tag for one in waiting)
        for tenant in (A, B, HEAVY):
            numbers = [one.number for one in waiting if one.ask.tenant is tenant and not one.moved]
            assert numbers == sorted(numbers)
            ahead = [one.tag for one in waiting if one.ask.tenant is tenant]
            assert not ahead or queue.next_tag(tenant) >= ahead[-1]
    for one in list(queue):
        queue.remove(one)
    assert (len(queue), queue.slots, queue.kv_tokens) == (0, 0, 0)
