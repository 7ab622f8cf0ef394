"""Split and combine against the plain sum over experts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.tokens.placement import PlacementTable, WorkerEndpoint
from routing.tokens.split_combine import combine, split
from routing.tokens.wire import NO_EXPERT

EXPERTS, TOP_K = 16, 4
CHOICES = st.lists(st.one_of(st.just(NO_EXPERT), st.integers(0, EXPERTS - 1)), min_size=TOP_K, max_size=TOP_K,
                   unique_by=lambda expert: object() if expert == NO_EXPERT else expert)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=EXPERTS, max_size=EXPERTS))
def test_every_pair_goes_to_its_owner_exactly_once(chosen: list[list[int]], owners: list[int]) -> None:
    ids_TK, route_E = np.array(chosen, dtype=np.int16), np.array(owners, dtype=np.int16)
    planned = split(ids_TK, route_E)
    assert planned.uncovered == ()
    seen = np.full(ids_TK.shape, NO_EXPERT, dtype=np.int16)
    for part in planned.parts:
        for row, ids_K in zip(part.rows_R, part.expert_ids_RK, strict=True):
            assert (ids_K >= 0).any()  # no row travels for nothing
            for k in np.flatnonzero(ids_K >= 0):
                assert seen[row, k] == NO_EXPERT
                assert route_E[ids_K[k]] == part.worker
                seen[row, k] = ids_K[k]
    assert np.array_equal(seen, ids_TK)


def test_uncovered_experts_are_listed_and_sent_to_nobody() -> None:
    planned = split(np.array([[0, 1], [2, NO_EXPERT]], dtype=np.int16), np.array([0, -1, -1], dtype=np.int16))
    assert planned.uncovered == (1, 2)
    assert [(part.worker, part.rows_R.tolist()) for part in planned.parts] == [(0, [0])]


def test_combine_adds_rows_in_place() -> None:
    planned = split(np.array([[0], [1], [0]], dtype=np.int16), np.array([0, 1], dtype=np.int16))
    output = torch.zeros(3, 2)
    for part in planned.parts:
        combine(output, part, torch.full((len(part.rows_R), 2), part.worker + 1.0))
    assert output[:, 0].tolist() == [1.0, 2.0, 1.0]


def table(*held: tuple[int, ...]) -> PlacementTable:
    return PlacementTable(1, tuple(WorkerEndpoint(f"w{i}", f"h:{i}", {1: h}) for i, h in enumerate(held)))


def test_route_balances_over_holders_and_skips_the_excluded() -> None:
    everything = tuple(range(8))
    both = table(everything, everything)
    assert np.bincount(both.route(1, 8)).tolist() == [4, 4]
    assert both.route(1, 8, frozenset({"w0"})).tolist() == [1] * 8
    assert table((0, 1), (1, 2)).route(1, 4).tolist() == [0, 0, 1, -1]


def test_table_survives_json() -> None:
    made = table((0, 5), (3,))
    assert PlacementTable.from_json(made.to_json()) == made
