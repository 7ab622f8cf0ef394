"""A placement from nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from benchmarks.balance.eplb import device_loads, eplb
from routing.tokens.balancing import BalanceOptions, WorkerCapacity, place, score
from tests.unit.routing.tokens.balancing.cases import (
    EXPERT_BYTES,
    check,
    fleet,
    holders,
    situations,
    skewed,
    worker_rows,
)  # fmt: skip

Situation = tuple[np.ndarray, list[WorkerCapacity], int]


def options(floor: int = 1) -> BalanceOptions:
    return BalanceOptions(EXPERT_BYTES, replica_floor=floor)


@settings(max_examples=150, deadline=None)
@given(situations())
def test_capacity_floor_and_weights_hold(situation: Situation) -> None:
    loads_LE, workers, floor = situation
    check(place(loads_LE, workers, options(floor)), workers, floor)


@settings(max_examples=150, deadline=None)
@given(situations(floors=(2, 3)))
def test_replicas_of_the_floor_are_apart_when_that_is_possible(situation: Situation) -> None:
    loads_LE, workers, floor = situation
    held = holders(place(loads_LE, workers, options(floor)))
    layers, experts = loads_LE.shape
    for domain_of in (lambda one: one.zone, lambda one: (one.zone, one.host)):
        slots: dict[object, int] = {}
        for worker in workers:
            own = min(worker.capacity_bytes // EXPERT_BYTES // layers, experts)
            slots[domain_of(worker)] = slots.get(domain_of(worker), 0) + own
        if sum(min(count, experts) for count in slots.values()) >= floor * experts:
            domains = [len({domain_of(workers[at]) for at in of_expert}) for layer in held for of_expert in layer]
            assert min(domains) >= floor


@settings(max_examples=150, deadline=None)
@given(situations(floors=(1,)))
def test_never_worse_than_eplb_at_equal_slots(situation: Situation) -> None:
    loads_LE, some, _ = situation
    slots = -(-loads_LE.shape[1] // len(some)) + 1
    workers = fleet(len(some), slots, len(loads_LE))
    loads_LE = loads_LE + 1
    theirs_LE = device_loads(loads_LE, eplb(loads_LE, slots * len(workers), 1, 1, len(workers)), len(workers))
    ours_LE = worker_rows(place(loads_LE, workers, options()), loads_LE, len(workers))
    assert (ours_LE.max(axis=1) <= theirs_LE.max(axis=1) * (1 + 1e-4)).all()


def test_a_fast_worker_gets_more() -> None:
    loads_LE = skewed(4, 32, 0)
    workers = fleet(8, 5, 4, speeds=[3, 1])
    rows_LW = worker_rows(place(loads_LE, workers, options()), loads_LE, 8)
    assert rows_LW[:, ::2].sum() / rows_LW[:, 1::2].sum() == pytest.approx(3, rel=0.1)
    assert score(place(loads_LE, workers, options()), loads_LE, workers, options()).balancedness > 0.95


def test_a_large_worker_holds_more() -> None:
    workers = [WorkerCapacity("large", 60 * EXPERT_BYTES, 1, "a"), WorkerCapacity("small", 30 * EXPERT_BYTES, 1, "b")]
    placement = place(skewed(3, 28, 1), workers, options())
    check(placement, workers, 1)
    assert (placement.workers_LER == 0).sum() == 60


def test_memory_that_layers_do_not_divide_is_used_as_well() -> None:
    workers = [WorkerCapacity(f"w{slots}", slots * EXPERT_BYTES + 3, 1, f"h{slots}") for slots in (7, 2, 11, 4)]
    placement = place(skewed(3, 8, 0), workers, options())
    check(placement, workers, 1)
    assert (placement.workers_LER >= 0).sum() == 24  # not one to spare
    assert sorted((placement.workers_LER == 1).sum(axis=(1, 2)).tolist()) == [0, 1, 1]


def test_hot_experts_get_replicas_and_the_slots_are_used() -> None:
    loads_LE = np.ones((1, 16))
    loads_LE[0, 3] = 100
    placement = place(loads_LE, fleet(8, 4, 1), options())
    copies_E = (placement.workers_LER[0] >= 0).sum(axis=1)
    assert copies_E[3] >= 7
    assert copies_E.sum() == 32


def test_a_layer_without_loads_counts_as_even() -> None:
    placement = place(np.zeros((2, 8)), fleet(4, 2, 2), options())
    rows_LW = worker_rows(placement, np.ones((2, 8)), 4)
    assert (rows_LW == 2).all()


def test_too_little_room_lowers_the_floor_then_leaves_the_least_loaded_out() -> None:
    loads_LE = np.array([[5.0, 4, 3, 2]])
    check(place(loads_LE, fleet(2, 3, 1), options(2)), fleet(2, 3, 1), 1)
    held = holders(place(loads_LE, fleet(1, 3, 1), options(2)))[0]
    assert [len(of_expert) for of_expert in held] == [1, 1, 1, 0]
    assert score(place(loads_LE, fleet(1, 3, 1), options()), loads_LE, fleet(1, 3, 1), options()).missing == 1


@pytest.mark.parametrize(
    ("loads_LE", "workers", "message"),
    [
        (np.ones((1, 2)), [], "no workers"),
        (np.ones((1, 2)), [WorkerCapacity("w", 100, 0.0, "h")], "positive"),
        (np.full((1, 2), np.nan), fleet(1, 2, 1), "finite"),
        (np.ones(2), fleet(1, 2, 1), "layers, experts"),
    ],
)
def test_what_makes_no_sense_is_refused(loads_LE: np.ndarray, workers: list[WorkerCapacity], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(loads_LE, workers, options())
