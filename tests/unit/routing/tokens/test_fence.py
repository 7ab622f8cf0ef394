"""When a worker takes itself out of service."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import FrameError, WorkerFailing
from routing.tokens.fence import FAILED_TURNS, Fence
from tests.unit.routing.tokens.turns import Turns, request


def test_failures_in_a_row_close_it_once(caplog: pytest.LogCaptureFixture) -> None:
    fence = Fence(30.0)
    for _ in range(FAILED_TURNS - 1):
        fence.failed(MemoryError())
    fence.computed(0.1)
    for _ in range(FAILED_TURNS - 1):
        fence.failed(MemoryError())
    assert fence.reason is None
    fence.failed(MemoryError("the last"))
    reason = fence.reason
    assert reason == "3 turns of the experts in a row failed, the last with MemoryError('the last')"
    fence.computed(0.1)
    fence.failed(ValueError())
    assert fence.look(99.0) == reason
    assert len(caplog.records) == 1


def test_an_error_of_the_device_closes_it_at_once() -> None:
    fence = Fence(30.0)
    fence.failed(torch.OutOfMemoryError("CUDA out of memory"))
    assert fence.reason is None
    fence.failed(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert "its device failed" in (fence.reason or "")


def test_a_turn_that_hangs_closes_it() -> None:
    fence = Fence(30.0)
    assert fence.look(29.9) is None
    assert "more than dispatch.call_timeout_s (30 s)" in (fence.look(30.1) or "")
    assert fence.look(0.0) is not None


def known(longest_s: float) -> Fence:
    fence = Fence(30.0)
    for _ in range(300):
        fence.computed(longest_s)
    return fence


@pytest.mark.parametrize(("longest_s", "hangs_after_s"), [(0.01, 11), (0.8, 17), (5.0, 31)])
def test_a_turn_that_takes_much_longer_than_any_before_hangs(longest_s: float, hangs_after_s: int) -> None:
    fence = known(longest_s)
    for second in range(hangs_after_s):
        assert fence.look(float(second)) is None
    assert "seems to hang" in (fence.look(float(hangs_after_s)) or "")


def test_the_first_turns_may_take_long() -> None:
    fence = Fence(30.0)
    fence.computed(0.01)
    assert all(fence.look(float(second)) is None for second in range(30))


def test_a_process_that_stood_still_does_not_hang() -> None:
    fence = known(0.01)
    assert fence.look(0.5) is None
    assert fence.look(25.0) is None  # stopped and continued, or a frozen host
    assert fence.look(0.2) is None
    assert all(fence.look(float(second)) is None for second in range(9))


def turns_that_raise(*errors: Exception | None) -> Turns:
    each = iter(errors)

    def kernel(layer: int, rows: int) -> float:
        error = next(each)
        if error is not None:
            raise error
        return 0.1

    return Turns(kernel)


def run(turns: Turns, requests: int) -> None:
    for _ in range(requests):
        turns.add(request(1))
        turns.turn()


def test_turns_that_fail_are_told_to_the_fence() -> None:
    turns = turns_that_raise(*[RuntimeError("kernel")] * 3)
    run(turns, 2)
    assert turns.fence.reason is None
    run(turns, 1)
    assert turns.fence.reason is not None
    assert all(isinstance(one.result, WorkerFailing) for one in turns.finished)


def test_a_callers_mistake_is_no_failure_of_the_worker() -> None:
    turns = turns_that_raise(*[FrameError("no such id")] * 9)
    run(turns, 9)
    assert turns.fence.reason is None


def test_one_request_of_several_that_fails_is_no_failed_turn() -> None:
    for _ in range(3):
        turns = turns_that_raise(RuntimeError("together"), None, RuntimeError("alone"))
        turns.add(request(1))
        turns.add(request(1))
        turns.turn()
        assert turns.fence._failed == 0


def test_a_turn_of_several_that_all_fail_is_one() -> None:
    turns = turns_that_raise(*[RuntimeError("kernel")] * 3)
    turns.add(request(1))
    turns.add(request(1))
    turns.turn()
    assert turns.fence._failed == 1
