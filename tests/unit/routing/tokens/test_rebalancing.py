"""What is proposed for live workers, by load, speed, memory and where they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from routing.tokens.membership import WorkerMember
from routing.tokens.rebalancing import RebalanceOptions, capacities_of, placement_of, propose, step_s

GIB = 1 << 30
OPTIONS = RebalanceOptions(replicas=1, headroom=0.5, budget_bytes=GIB, threshold=0.05)


def member(name: str, **said: object) -> WorkerMember:
    made = WorkerMember(name, 0, 1, f"node-{name}", "h:1", "ready", elastic=True, expert_bytes=1 << 20,
                        free_bytes=64 * GIB, speed=1000.0)  # fmt: skip
    return replace(made, **said)


def halves(layers: int, experts: int) -> dict[str, np.ndarray]:
    first_LE = np.zeros((layers, experts), dtype=bool)
    first_LE[:, : experts // 2] = True
    return {"a": first_LE, "b": ~first_LE}


def test_an_even_load_on_even_workers_moves_nothing() -> None:
    shares = halves(4, 16)
    proposal = propose(np.full((4, 16), 1000.0), [member("a"), member("b")], shares, {"a": 32, "b": 32}, OPTIONS)
    assert not proposal.worth_it
    assert proposal.moved_bytes == 0
    assert all(np.array_equal(proposal.shares[name], shares[name]) for name in shares)


def test_a_fast_worker_gets_experts_of_a_slow_one() -> None:
    shares, first = halves(4, 16), {"a": 32, "b": 32}
    fast = [member("a", speed=3000.0), member("b")]
    even = np.full((4, 16), 1000.0)
    proposal = propose(even, fast, shares, first, OPTIONS)
    assert proposal.worth_it
    assert proposal.gain > 0.3  # of the half that the slow one computes alone, a half is left at best
    assert proposal.shares["a"].sum() > 32
    assert (proposal.shares["a"] | proposal.shares["b"]).all()
    then_s, now_s = step_s(even, fast, shares, OPTIONS), step_s(even, fast, proposal.shares, OPTIONS)
    assert now_s < 0.7 * then_s
    # The rows of what both hold are divided by speed: the fast one gets the most.
    both = proposal.shares["a"] & proposal.shares["b"]
    assert proposal.weights["a"][both].sum() > proposal.weights["b"][both].sum()


def test_a_hot_expert_gets_a_second_holder() -> None:
    tokens = np.full((1, 16), 100.0)
    tokens[0, 3] = 5000.0
    proposal = propose(tokens, [member("a"), member("b")], halves(1, 16), {"a": 8, "b": 8}, OPTIONS)
    assert proposal.worth_it
    assert proposal.shares["b"][0, 3]


@pytest.mark.parametrize(("headroom", "free_bytes", "capacity"), [
    (0.5, 64 * GIB, 48), (0.0, 64 * GIB, 32), (0.5, 0, 32), (0.5, GIB + 16 * (1 << 20), 40), (4.0, 64 * GIB, 160),
])  # fmt: skip
def test_what_a_worker_may_hold(headroom: float, free_bytes: int, capacity: int) -> None:
    pair = [member(name, node="same", free_bytes=free_bytes) for name in "ab"]  # two share what is free
    found = capacities_of(pair, halves(4, 16), {"a": 32, "b": 32}, headroom)
    assert [one.capacity_bytes for one in found] == [capacity] * 2


def test_what_it_holds_beyond_its_first_share_it_may_keep() -> None:
    found = capacities_of([member("a"), member("b")], halves(4, 16), {"a": 8, "b": 8}, 0.5)
    assert [one.capacity_bytes for one in found] == [32, 32]


@pytest.mark.parametrize(("rate", "equal"), [(1150.0, True), (0.0, True), (3000.0, False)])
def test_speeds_count_where_they_are_known_and_differ(rate: float, equal: bool) -> None:
    pair = [member("a", speed=1000.0), member("b", speed=rate)]
    speeds = [one.rows_per_s for one in capacities_of(pair, halves(1, 4), {}, 0.0)]
    assert (speeds[0] == speeds[1]) == equal


def test_a_budget_bounds_the_moves() -> None:
    fast = [member("a", speed=3000.0), member("b")]
    tight = replace(OPTIONS, budget_bytes=3 << 20)
    proposal = propose(np.full((4, 16), 1000.0), fast, halves(4, 16), {"a": 32, "b": 32}, tight)
    assert 0 < proposal.moved_bytes <= 3 << 20


def test_who_holds_what() -> None:
    a, b = np.array([[True, True, False]]), np.array([[False, True, False]])
    made = placement_of([a, b])
    assert made.workers_LER.tolist() == [[[0, -1], [0, 1], [-1, -1]]]
    assert made.weights_LER.tolist() == [[[1, 0], [0.5, 0.5], [0, 0]]]
