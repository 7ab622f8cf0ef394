"""Moves from one placement to a better one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.tokens.balancing import BalanceOptions, Placement, Plan, WorkerCapacity, balance, place, score
from tests.unit.routing.tokens.balancing.cases import (
    EXPERT_BYTES,
    check,
    fleet,
    holders,
    situations,
    skewed,
    worker_rows,
)

Situation = tuple[np.ndarray, list[WorkerCapacity], int]


def options(floor: int = 1, budget: int | None = None) -> BalanceOptions:
    return BalanceOptions(EXPERT_BYTES, replica_floor=floor, budget_bytes=budget)


def without(placement: Placement, *gone: int) -> Placement:
    """The placement after the loss of some workers."""
    return dataclasses.replace(
        placement, workers_LER=np.where(np.isin(placement.workers_LER, gone), -1, placement.workers_LER)
    )


def check_every_prefix(
    plan: Plan, loads_LE: np.ndarray, workers: list[WorkerCapacity], chosen: BalanceOptions
) -> None:
    """Carry the moves out one by one: nobody holds too much, nothing is lost, and no score is worse than the last."""
    held = holders(plan.start)
    last = plan.redivided
    for done, move in enumerate(plan.moves, 1):
        least = [[min(len(of_expert), chosen.replica_floor) for of_expert in of_layer] for of_layer in held]
        if move.replaces is not None:
            held[move.layer][move.replaces].remove(move.worker)
        assert move.worker not in held[move.layer][move.expert]
        held[move.layer][move.expert].add(move.worker)
        for at, worker in enumerate(workers):
            count = sum(at in of_expert for of_layer in held for of_expert in of_layer)
            assert count * EXPERT_BYTES <= worker.capacity_bytes
        for of_layer, least_of_layer in zip(held, least, strict=True):
            assert all(len(of_expert) >= few for of_expert, few in zip(of_layer, least_of_layer, strict=True))
        after = plan.placement_after(done)
        assert holders(after) == held
        now = score(after, loads_LE, workers, chosen)
        assert now.missing <= last.missing
        if now.missing == last.missing:
            assert now.seconds <= last.seconds * (1 + 1e-5) + 1e-9
            assert last.seconds - now.seconds == pytest.approx(move.gain_s, abs=1e-5 * (1 + last.seconds))
        last = now
    assert last.missing == plan.after.missing
    assert last.seconds == pytest.approx(plan.after.seconds, rel=1e-5)


@settings(max_examples=80, deadline=None)
@given(situations(), st.integers(0, 2**16))
def test_wherever_one_stops_all_is_well(situation: Situation, seed: int) -> None:
    loads_LE, workers, floor = situation
    start = place(loads_LE, workers, options(floor))
    shifted_LE = np.random.default_rng(seed).permuted(loads_LE, axis=1)
    plan = balance(shifted_LE, workers, start, options(floor))
    check_every_prefix(plan, shifted_LE, workers, options(floor))
    check(plan.target, workers, floor)


@settings(max_examples=80, deadline=None)
@given(situations(), st.data())
def test_lost_replicas_come_back_first(situation: Situation, data: st.DataObject) -> None:
    loads_LE, workers, floor = situation
    start = place(loads_LE, workers, options(floor))
    gone = data.draw(st.integers(0, len(workers) - 1))
    left = [*workers]
    left[gone] = dataclasses.replace(workers[gone], capacity_bytes=0)
    current = without(start, gone)
    plan = balance(loads_LE, left, current, options(floor, budget=0))
    covered = sum(bool(of_expert) for of_layer in holders(current) for of_expert in of_layer)
    check_every_prefix(plan, loads_LE, left, options(floor))
    assert all(move.mends for move in plan.moves)  # the budget is for the others
    layers, experts = loads_LE.shape
    if sum(worker.capacity_bytes // EXPERT_BYTES // layers for worker in left) >= experts:
        check(plan.target, left, 1)
    bare = loads_LE.size - covered
    for done in range(min(bare, len(plan.moves))):
        now = sum(bool(of_expert) for of_layer in holders(plan.placement_after(done + 1)) for of_expert in of_layer)
        assert now == covered + done + 1  # experts that nobody holds go before all others
    if plan.moves:
        assert plan.worth_it


def test_a_host_is_lost() -> None:
    loads_LE, workers = skewed(6, 32, 0), fleet(8, 10, 6, per_host=2)
    current = without(place(loads_LE, workers, options(2)), 0, 1)
    left = [dataclasses.replace(worker, capacity_bytes=0 if at < 2 else worker.capacity_bytes * 2)
            for at, worker in enumerate(workers)]  # fmt: skip
    assert score(current, loads_LE, left, options(1)).missing == 0  # all were on two hosts
    assert score(current, loads_LE, left, options(2)).missing > 0
    plan = balance(loads_LE, left, current, options(2))
    assert plan.after.missing == 0
    check(plan.target, left, 2)


def test_a_new_worker_is_put_to_use() -> None:
    loads_LE, workers = skewed(5, 32, 0), fleet(5, 10, 5)
    old = place(loads_LE, workers[:4], options())
    plan = balance(loads_LE, workers, old, options())
    rows_LW = worker_rows(plan.target, loads_LE, 5)
    assert worker_rows(old, loads_LE, 5)[:, 4].sum() == 0
    assert rows_LW[:, 4].sum() == pytest.approx(loads_LE.sum() / 5, rel=0.2)
    assert plan.worth_it
    assert plan.after.step_s < plan.before.step_s * 0.85
    check_every_prefix(plan, loads_LE, workers, options())


def test_a_budget_buys_the_best_moves() -> None:
    loads_LE, workers = skewed(8, 64, 0), fleet(8, 10, 8, per_host=2)
    start = place(loads_LE, workers, options())
    shifted_LE = np.roll(loads_LE, 7, axis=1)
    plans = [balance(shifted_LE, workers, start, options(budget=count * EXPERT_BYTES)) for count in (0, 5, 20, 10_000)]
    assert plans[0].moves == ()
    assert plans[0].redivided.step_s < plans[0].before.step_s
    assert [len(plan.moves) <= count for plan, count in zip(plans, (0, 5, 20, 10_000), strict=True)] == [True] * 4
    seconds = [plan.after.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == 4
    per_move = [(before.after.seconds - after.after.seconds) / (len(after.moves) - len(before.moves))
                for before, after in pairwise(plans)]  # fmt: skip
    assert per_move == sorted(per_move, reverse=True)


def test_what_is_level_stays() -> None:
    loads_LE, workers = skewed(4, 64, 0), fleet(8, 10, 4)
    start = place(loads_LE, workers, options())
    plan = balance(loads_LE, workers, start, options())
    assert not plan.worth_it
    assert plan.nbytes == len(plan.moves) * EXPERT_BYTES
    assert plan.after.step_s <= plan.before.step_s


def test_the_threshold_decides_whether_it_pays() -> None:
    loads_LE, workers = skewed(8, 64, 0), fleet(8, 10, 8)
    start = place(loads_LE, workers, options())
    shifted_LE = np.roll(loads_LE, 3, axis=1)
    plan = balance(shifted_LE, workers, start, options())
    won = 1 - plan.after.seconds / plan.before.seconds
    for threshold, worth_it in ((won * 0.99, True), (won * 1.01, False)):
        assert balance(
            shifted_LE, workers, start, dataclasses.replace(options(), threshold=threshold)
        ).worth_it == worth_it  # fmt: skip


def test_no_room_no_moves() -> None:
    loads_LE, workers = skewed(2, 16, 0), fleet(4, 4, 2)
    start = place(loads_LE, workers, options())
    assert balance(np.roll(loads_LE, 1, axis=1), workers, start, options()).moves == ()


def test_a_placement_of_something_else_is_refused() -> None:
    loads_LE, workers = skewed(2, 16, 0), fleet(4, 5, 2)
    start = place(loads_LE, workers, options())
    with pytest.raises(ValueError, match="other layers"):
        balance(loads_LE[:, :-1], workers, start, options())
    with pytest.raises(ValueError, match="other layers"):
        balance(loads_LE, workers[:-1], start, options())
    with pytest.raises(ValueError, match="has room for"):
        balance(loads_LE, fleet(4, 3, 2), start, options())
