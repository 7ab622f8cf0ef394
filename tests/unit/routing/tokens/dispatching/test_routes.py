"""Routes of all layers at once: who gets which turns of which expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.tokens.dispatching.routes import NOBODY, TURNS, UNCOVERED, Routes
from routing.tokens.placement import PlacementTable, Stamp, WorkerEndpoint

EXPERTS = 9
HELD = st.lists(st.dictionaries(st.integers(3, 5), st.sets(st.integers(0, EXPERTS - 1)).map(sorted)), max_size=5)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5)


def routes_of(held: list[dict[int, list[int]]], weight_W: list[float] | None = None, experts: int = EXPERTS) -> Routes:
    workers = [WorkerEndpoint(f"w{at}", f"h:{at}", ids) for at, ids in enumerate(held)]
    weights = {f"w{at}": dict.fromkeys((3, 4, 5), np.full(EXPERTS, weight)) for at, weight in enumerate(weight_W or ())}
    return PlacementTable.of(Stamp(1, 1), workers, weights).routes(experts)


@settings(max_examples=400, deadline=None)
@given(HELD, WEIGHTS)
def test_every_turn_is_a_holders_and_every_holder_has_its_part(
    held: list[dict[int, list[int]]], weight_W: list[float]
) -> None:
    routes = routes_of(held, weight_W)
    for layer in (3, 4, 5, 6):
        route_EQ = routes.layer(layer)
        assert route_EQ.shape == (EXPERTS + 1, route_EQ.shape[1])
        assert (route_EQ[-1] == NOBODY).all()
        for expert in range(EXPERTS):
            holders = [w for w, ids in enumerate(held) if expert in ids.get(layer, ())]
            assert set(route_EQ[expert].tolist()) == set(holders or [UNCOVERED])
            total = sum(weight_W[w] for w in holders)
            for w in holders:
                turns = int((route_EQ[expert] == w).sum()) * TURNS / route_EQ.shape[1]
                assert turns >= 1
                assert abs(turns - TURNS * weight_W[w] / total) < len(
                    holders
                )  # the least have one, at the others' cost


@settings(max_examples=100, deadline=None)
@given(HELD, st.sets(st.integers(0, 4)))
def test_without_some_workers_only_their_turns_move(held: list[dict[int, list[int]]], out: set[int]) -> None:
    routes = routes_of(held)
    excluded = frozenset(f"w{at}" for at in out)
    for layer in (3, 4, 5):
        before_EQ, after_EQ = routes.layer(layer), routes.layer(layer, excluded)
        stays_EQ = ~np.isin(before_EQ, [*out])
        assert (after_EQ == before_EQ)[stays_EQ].all()
        for expert in range(EXPERTS):
            left = [w for w, ids in enumerate(held) if w not in out and expert in ids.get(layer, ())]
            assert set(after_EQ[expert].tolist()) <= set(left or [UNCOVERED])


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_one_turn_of_all_experts_is_divided_too(workers: int) -> None:
    route_EQ = routes_of([{1: list(range(48))}] * workers, experts=48).layer(1)
    for turn in range(TURNS):
        counts = np.bincount(route_EQ[:-1, turn], minlength=workers)
        assert counts.max() - counts.min() <= 48 // workers // 4


def test_the_load_of_an_excluded_worker_spreads() -> None:
    route_EQ = routes_of([{1: list(range(8))}] * 4, experts=8).layer(1, frozenset({"w0"}))
    counts = np.bincount(route_EQ[:-1].ravel(), minlength=4)
    assert counts[0] == 0
    assert counts[1:].max() - counts[1:].min() <= 8


def test_more_holders_than_turns() -> None:
    route_EQ = routes_of([{1: [0]}] * 30, experts=1).layer(1)
    assert sorted(route_EQ[0].tolist()) == list(range(30))


def test_experts_that_no_worker_ever_named_are_uncovered() -> None:
    assert routes_of([{1: [0]}], experts=3).layer(1).tolist() == [[0], [UNCOVERED], [UNCOVERED], [NOBODY]]


def test_the_cache_of_exclusions_is_bounded() -> None:
    routes = routes_of([{1: [0]}] * 30, experts=1)
    for at in range(30):
        routes.layer(1, frozenset({f"w{at}"}))
    assert len(routes._without) <= 8
    assert 0 not in routes.layer(1, frozenset({"w0"}))
