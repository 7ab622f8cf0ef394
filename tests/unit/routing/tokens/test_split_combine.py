"""Split and combine against the plain sum over experts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.tokens import split_combine
from routing.tokens.dispatching.routes import NOBODY, TURNS
from routing.tokens.placement import PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.split_combine import RowSum, split
from routing.tokens.wire import NO_EXPERT

EXPERTS, TOP_K = 16, 4
CHOICES = st.lists(st.one_of(st.just(NO_EXPERT), st.integers(0, EXPERTS - 1)), min_size=TOP_K, max_size=TOP_K,
                   unique_by=lambda expert: object() if expert == NO_EXPERT else expert)  # fmt: skip


def route(*owners: int) -> np.ndarray:
    """A route in which each expert has one owner."""
    return np.array([*owners, NOBODY], dtype=np.int16)[:, None]


@settings(max_examples=100, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=20), st.integers(0, 6), st.data())
def test_every_pair_goes_to_its_owner_exactly_once(chosen: list[list[int]], most: int, data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, most), min_size=EXPERTS, max_size=EXPERTS))
    ids_TK, route_EQ = np.array(chosen, dtype=np.int16), route(*owners)
    planned = split(ids_TK, route_EQ)
    assert planned.uncovered == ()
    assert [part.worker for part in planned.parts] == sorted({part.worker for part in planned.parts})
    seen = np.full(ids_TK.shape, NO_EXPERT, dtype=np.int16)
    for part in planned.parts:
        assert np.array_equal(part.rows_R, np.unique(part.rows_R))
        for row, ids_K in zip(part.rows_R, part.expert_ids_RK, strict=True):
            assert (ids_K >= 0).any()  # no row travels for nothing
            for k in np.flatnonzero(ids_K >= 0):
                assert seen[row, k] == NO_EXPERT
                assert route_EQ[ids_K[k], 0] == part.worker
                seen[row, k] = ids_K[k]
    assert np.array_equal(seen, ids_TK)


@pytest.mark.parametrize("workers", [1, 6])  # by a pass per worker, and by sorting
@pytest.mark.parametrize("rows", [1, 2])
def test_uncovered_experts_are_listed_and_sent_to_nobody(rows: int, workers: int) -> None:
    ids_TK = np.array([[0, 2, 1], [2, NO_EXPERT, NO_EXPERT]], dtype=np.int16)[:rows]
    planned = split(ids_TK, route(0, -1, -1, *range(workers)))
    assert planned.uncovered == (1, 2)
    assert [(part.worker, part.rows_R.tolist()) for part in planned.parts] == [(0, [0])]


@pytest.mark.parametrize("workers", [1, 6])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_that_need_nothing_go_nowhere(rows: int, workers: int) -> None:
    assert split(np.full((rows, 2), NO_EXPERT, dtype=np.int16), route(*range(workers))) == ((), ())
    assert split(np.zeros((rows, 0), dtype=np.int16), route(*range(workers))) == ((), ())


def test_a_layer_without_any_worker_is_all_uncovered() -> None:
    assert split(np.array([[1, 0], [1, NO_EXPERT]], dtype=np.int16), route(-1, -1)) == ((), (0, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12), st.integers(1, 7), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_sum_is_exact_up_to_one_rounding(
    rows: int, replies: int, sent: torch.dtype, wanted: torch.dtype, large: bool, seed: int
) -> None:
    hidden, random = 24, Random(seed)
    exact, got = torch.zeros(rows, hidden, dtype=torch.float64), RowSum(rows, hidden)
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(split_combine, "_PASS_BYTES", 200)
        for _ in range(replies):
            rows_R = np.array(sorted(random.sample(range(rows), random.choice([rows, random.randint(0, rows)]))), int)
            reply_RH = torch.tensor([[random.gauss(0, 1) for _ in range(hidden)] for _ in rows_R]).to(sent)
            got.add(rows_R, reply_RH.view(-1, hidden))
            exact[rows_R] += reply_RH.view(-1, hidden)
        total = got.total(wanted)
    assert total.dtype == wanted
    half_a_place = torch.finfo(wanted).eps / 2
    torch.testing.assert_close(total.double(), exact, rtol=half_a_place * 1.01, atol=2e-6)


def test_the_sum_is_memory_of_its_own() -> None:
    reply, total = torch.ones(2, 3), RowSum(2, 3)
    total.add(np.arange(2), reply)
    total.total(torch.float32).zero_()
    assert reply.sum() == 6


def divided(ids_TK: np.ndarray, weight_W: list[float], salt: int) -> np.ndarray:
    """Rows per worker of one expert that all workers hold."""
    workers = [WorkerEndpoint(f"w{at}", f"h:{at}", {1: range(4)}) for at in range(len(weight_W))]
    weights = {f"w{at}": {1: np.full(4, weight)} for at, weight in enumerate(weight_W)}
    planned = split(ids_TK, PlacementTable.of(Stamp(1, 1), workers, weights).routes(4).layer(1), salt)
    rows = np.zeros(len(weight_W), dtype=int)
    for part in planned.parts:
        rows[part.worker] = (part.expert_ids_RK == 2).sum()
    return rows


@pytest.mark.parametrize("salt", [0, 5, 65535])
def test_many_rows_of_an_expert_are_divided_in_proportion(salt: int) -> None:
    ids_TK = np.array([[2, NO_EXPERT]] * 512, dtype=np.int16)
    assert divided(ids_TK, [3, 1], salt).tolist() == [384, 128]
    assert divided(ids_TK, [1, 1, 1, 1], salt).tolist() == [128] * 4


@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_few_rows_of_an_expert_stay_together_and_go_to_each_holder_in_turn(rows: int) -> None:
    ids_TK = np.array([[at % 4 if rows > 16 else 2, NO_EXPERT] for at in range(rows)], dtype=np.int16)
    here = int((ids_TK == 2).sum())
    by_salt = np.array([divided(ids_TK, [1, 1], salt) for salt in range(TURNS)])
    assert set(map(tuple, by_salt.tolist())) == ({(here, 0), (0, here)} if here else {(0, 0)})
    assert by_salt.sum(0).tolist() == [here * TURNS // 2] * 2


@settings(max_examples=100, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=60), st.integers(2, 5), st.integers(0, 65535))
def test_every_pair_of_divided_experts_goes_out_exactly_once(chosen: list[list[int]], most: int, salt: int) -> None:
    ids_TK = np.array(chosen, dtype=np.int16)
    workers = [WorkerEndpoint(f"w{at}", f"h:{at}", {1: range(EXPERTS)}) for at in range(most)]
    planned = split(ids_TK, PlacementTable.of(Stamp(1, 1), workers).routes(EXPERTS).layer(1), salt)
    seen_TK = np.full(ids_TK.shape, NO_EXPERT, dtype=np.int16)
    for part in planned.parts:
        asked_RK = part.expert_ids_RK != NO_EXPERT
        assert (seen_TK[part.rows_R][asked_RK] == NO_EXPERT).all()
        seen_TK[part.rows_R] = np.where(asked_RK, part.expert_ids_RK, seen_TK[part.rows_R])
    assert np.array_equal(seen_TK, ids_TK)
