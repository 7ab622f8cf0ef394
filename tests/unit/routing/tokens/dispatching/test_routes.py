"""Routes of all layers at once against the rule, one expert at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.tokens.dispatching.routes import NOBODY, UNCOVERED, Routes

EXPERTS = 9
HELD = st.lists(st.dictionaries(st.integers(3, 5), st.sets(st.integers(0, EXPERTS - 1)).map(sorted)), max_size=5)


def by_the_rule(held: list[list[int]]) -> list[int]:
    """Experts with the least choice first; each to the holder with the fewest so far."""
    holders = {expert: [w for w, ids in enumerate(held) if expert in ids] for expert in range(EXPERTS)}
    route, load = [UNCOVERED] * EXPERTS, [0] * len(held)
    for expert in sorted(holders, key=lambda e: (len(holders[e]), e)):
        if holders[expert]:
            route[expert] = min(holders[expert], key=lambda w: (load[w], w))
            load[route[expert]] += 1
    return route


@settings(max_examples=100, deadline=None)
@given(HELD)
def test_every_layer_follows_the_rule(held: list[dict[int, list[int]]]) -> None:
    routes = Routes([f"w{at}" for at in range(len(held))], held, EXPERTS)
    for layer in (3, 4, 5, 6):
        assert routes.layer(layer).tolist() == [*by_the_rule([ids.get(layer, []) for ids in held]), NOBODY]


@settings(max_examples=100, deadline=None)
@given(HELD, st.sets(st.integers(0, 4)))
def test_without_some_workers_only_their_experts_move(held: list[dict[int, list[int]]], out: set[int]) -> None:
    routes = Routes([f"w{at}" for at in range(len(held))], held, EXPERTS)
    excluded = frozenset(f"w{at}" for at in out)
    for layer in (3, 4, 5):
        before, after = routes.layer(layer), routes.layer(layer, excluded)
        for expert in range(EXPERTS):
            if before[expert] not in out:
                assert after[expert] == before[expert]
            left = [w for w, ids in enumerate(held) if w not in out and expert in ids.get(layer, ())]
            assert (after[expert] in left) if left else (after[expert] == UNCOVERED)
        assert after[-1] == NOBODY


def test_the_load_of_an_excluded_worker_spreads() -> None:
    everything = {1: list(range(8))}
    routes = Routes(["a", "b", "c", "d"], [everything] * 4, 8)
    assert np.bincount(routes.layer(1, frozenset({"a"}))[:-1], minlength=4).tolist() == [0, 3, 3, 2]


def test_the_cache_of_exclusions_is_bounded() -> None:
    routes = Routes([f"w{at}" for at in range(30)], [{1: [0]}] * 30, 1)
    for at in range(30):
        routes.layer(1, frozenset({f"w{at}"}))
    assert len(routes._without) <= 8
    assert routes.layer(1, frozenset({"w0"})).tolist() == [1, NOBODY]
