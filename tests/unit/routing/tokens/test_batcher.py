"""Who is computed when, and what each request is told of its wait. The clock is ours."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cluster.errors import FrameError, WorkerBusy, WorkerFailing
from routing.tokens.batcher import QueuedRequest
from tests.unit.routing.tokens.turns import Nobody, Turns, request


def per_row(layer: int, rows: int) -> float:
    return rows / 1000


def test_five_clients_at_five_layers_wait_for_those_before_them_only() -> None:
    turns = Turns(lambda layer, rows: 0.05)
    works = [turns.add(request(layer)) for layer in range(5)]
    turns.all()
    after_ms = [round(1000 * (turns.ended(work).at - 100.0)) for work in works]
    assert after_ms == [50, 100, 150, 200, 250]


def test_rows_of_one_layer_dtype_and_top_k_share_a_turn() -> None:
    turns = Turns(per_row)
    for item in (request(2), request(3), request(2), request(2, dtype=torch.bfloat16), request(2, top_k=2)):
        turns.add(item)
    turns.all()
    assert turns.batches == [(2, 4), (3, 2), (2, 2), (2, 2)]


def test_waits_are_from_arrival_to_the_start_of_the_own_computation() -> None:
    turns = Turns(lambda layer, rows: 1.0)
    first, second = turns.add(request(2)), turns.add(request(3))
    turns.now += 5.0
    third = turns.add(request(2))
    turns.all()
    assert [work.started - work.arrived for work in (first, second, third)] == [5.0, 6.0, 0.0]
    assert [work.compute_s for work in (first, second, third)] == [1.0, 1.0, 1.0]
    assert turns.runner.busy_s == 2.0


def test_a_turn_has_no_more_rows_than_the_bound() -> None:
    turns = Turns(per_row, max_rows=64)
    works = [turns.add(request(1, rows=7)) for _ in range(20)]
    turns.all()
    assert turns.batches == [(1, 64), (1, 64), (1, 12)]
    for work in works:  # the tenth was cut in two
        torch.testing.assert_close(turns.ended(work).result, request(1, rows=7).hidden_TH * 2)


def test_a_long_request_is_computed_in_slices_and_answered_whole() -> None:
    turns = Turns(per_row, max_rows=64)
    work = turns.add(request(1, rows=200))
    turns.all()
    assert turns.batches == [(1, 64), (1, 64), (1, 64), (1, 8)]
    torch.testing.assert_close(turns.ended(work).result, request(1, rows=200).hidden_TH * 2)
    assert work.compute_s == pytest.approx(0.2)
    assert work.started == 100.0


@pytest.mark.parametrize("layer", [9, 20], ids=["a layer of the prefill", "a layer of its own"])
def test_a_decode_step_waits_for_one_slice_of_any_amount_of_prefill(layer: int) -> None:
    decodes: list[QueuedRequest] = []
    in_slices: list[QueuedRequest] = []

    def kernel(_: int, rows: int) -> float:
        """A millisecond per row; a decode step comes in the middle of each slice, and of each other decode step."""
        turns.now += rows / 2000
        if len(decodes) < 150:
            decodes.append(turns.add(request(layer, rows=8)))
            if rows == 64:
                in_slices.append(decodes[-1])
        return rows / 2000

    turns = Turns(kernel, max_rows=64)
    for prefill in range(10):
        turns.add(request(prefill, rows=640))
    turns.all()
    assert turns.batches.count((0, 64)) == 10
    waits_s = {work: turns.ended(work).work.started - work.arrived for work in decodes}
    assert len(in_slices) > 50
    assert max(waits_s[work] for work in in_slices) <= 0.032 + 1e-9  # the rest of that slice
    assert max(waits_s.values()) <= 0.064 + 0.016 + 1e-9  # a slice, and the decode steps under way


def test_a_lone_decode_step_goes_before_prefill_that_came_later() -> None:
    turns = Turns(per_row, max_rows=64)
    turns.add(request(1, rows=1))
    turns.add(request(2, rows=100))
    turns.all()
    assert turns.batches[0] == (1, 1)


def test_prefill_gets_a_turn_after_each_round_of_decode_steps() -> None:
    turns = Turns(per_row, max_rows=64)
    prefill = turns.add(request(1, rows=640))
    for _ in range(40):  # two decode steps are always waiting
        for layer in (2, 3):
            turns.add(request(layer, rows=1))
        turns.turn()
        if any(finished.work is prefill for finished in turns.finished):
            break
    slices = [index for index, batch in enumerate(turns.batches) if batch[0] == 1]
    assert len(slices) == 10
    assert max(after - before for before, after in pairwise(slices)) <= 3


def test_prefill_turns_take_decode_rows_of_their_layer_along() -> None:
    turns = Turns(per_row, max_rows=64)
    turns.add(request(1, rows=60))
    turns.now += 0.001
    decode = turns.add(request(1, rows=4))
    turns.turn()
    assert turns.batches == [(1, 64)]
    assert turns.ended(decode).at == turns.now


def test_the_older_prefill_is_finished_first() -> None:
    turns = Turns(per_row, max_rows=64)
    older, newer = turns.add(request(1, rows=128)), turns.add(request(2, rows=128))
    turns.all()
    assert [layer for layer, _ in turns.batches] == [1, 1, 2, 2]
    assert turns.ended(older).at < turns.ended(newer).at


def test_a_deadline_that_passed_in_the_queue_costs_no_computation() -> None:
    turns = Turns(lambda layer, rows: 5.0)
    turns.add(request(1))
    late = turns.add(request(2, deadline_ms=3000))
    turns.all()
    assert turns.batches == [(1, 2)]
    assert isinstance(turns.ended(late).result, WorkerBusy)


def test_a_deadline_that_passes_between_slices_ends_the_request() -> None:
    turns = Turns(lambda layer, rows: 1.0, max_rows=64)
    late = turns.add(request(1, rows=640, deadline_ms=2500))
    turns.all()
    assert len(turns.batches) == 3
    assert isinstance(turns.ended(late).result, WorkerBusy)
    assert len(turns.batcher) == 0


def test_a_bad_request_fails_alone() -> None:
    def experts(layer: int, rows: int) -> float:
        if rows in (3, 10):
            raise FrameError("three rows are too many")
        return 0.1

    turns = Turns(experts)
    good, bad, other = (turns.add(request(1, rows=rows)) for rows in (2, 3, 5))
    turns.all()
    assert turns.batches == [(1, 10), (1, 2), (1, 3), (1, 5)]
    assert isinstance(turns.ended(bad).result, FrameError)
    for work, rows in ((good, 2), (other, 5)):
        torch.testing.assert_close(turns.ended(work).result, request(1, rows=rows).hidden_TH * 2)


def test_a_slice_that_fails_ends_its_request_and_no_other() -> None:
    calls = iter(range(100))

    def experts(layer: int, rows: int) -> float:
        if layer == 1 and next(calls) == 1:
            raise ZeroDivisionError
        return 0.1

    turns = Turns(experts, max_rows=64)
    bad, good = turns.add(request(1, rows=640)), turns.add(request(2, rows=128))
    turns.all()
    assert turns.batches == [(1, 64), (1, 64), (2, 64), (2, 64)]
    result = turns.ended(bad).result
    assert isinstance(result, WorkerFailing)
    assert isinstance(result.__cause__, ZeroDivisionError)
    torch.testing.assert_close(turns.ended(good).result, request(2, rows=128).hidden_TH * 2)


@pytest.mark.parametrize("part", [(slice(0, 1), slice(None)), (slice(None), slice(0, 1))])
def test_experts_that_return_another_shape_are_an_error(part: tuple[slice, slice]) -> None:
    turns = Turns(per_row)
    turns.runner._experts = lambda layer, hidden_TH, ids_TK, weights_TK: hidden_TH[part]
    work = turns.add(request(1))
    turns.turn()
    assert isinstance(turns.ended(work).result, WorkerFailing)


def test_requests_of_one_that_left_are_not_computed() -> None:
    turns = Turns(per_row, max_rows=64)
    gone, stays = Nobody(), Nobody()
    turns.add(request(1, rows=640), gone)
    turns.turn()
    for layer in (2, 3):
        turns.add(request(layer), gone)
    work = turns.add(request(4), stays)
    turns.batcher.drop_owner(gone)
    turns.all()
    assert turns.batches == [(1, 64), (4, 2)]
    assert [finished.work for finished in turns.finished] == [work]


def test_a_request_without_rows_is_answered() -> None:
    turns = Turns(per_row)
    work = turns.add(request(1, rows=0))
    turns.all()
    result = turns.ended(work).result
    assert isinstance(result, torch.Tensor)
    assert result.shape == (0, 4)


def test_a_reply_is_in_the_dtype_that_was_asked_for() -> None:
    turns = Turns(per_row, max_rows=8)
    for rows in (1, 20):
        work = turns.add(replace(request(1, rows=rows), reply_dtype=torch.bfloat16))
        turns.all()
        result = turns.ended(work).result
        assert isinstance(result, torch.Tensor)
        assert result.dtype is torch.bfloat16


def test_a_queue_that_waits_too_long_for_a_caller_is_full() -> None:
    turns = Turns(lambda layer, rows: 0.0)
    turns.add(request(1, rows=640))
    turns.now += 6.0
    turns.add(request(1, rows=640, deadline_ms=12_000))
    with pytest.raises(WorkerBusy, match=r"waiting for 6\.0 s, too long") as caught:
        turns.add(request(1, rows=640, deadline_ms=11_000))
    assert caught.value.queue_s == 6.0
    turns.add(request(1, rows=2, deadline_ms=1000))  # light ones do not wait for heavy ones
    assert len(turns.batcher) == 3
    turns.all()
    turns.add(request(1, rows=640, deadline_ms=1000))


def test_what_nothing_was_computed_of_can_be_taken_out() -> None:
    turns = Turns(per_row, max_rows=64)
    begun = turns.add(request(1, rows=640))
    turns.turn()
    waits = [turns.add(request(2, rows=640)), turns.add(request(1))]
    assert sorted(map(id, turns.batcher.drop_untouched())) == sorted(map(id, waits))
    turns.all()
    assert [one.work for one in turns.finished] == [begun]
