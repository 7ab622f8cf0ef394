"""What a dispatch remembers of its own workers."""

from __future__ import annotations

import pytest

from cluster.errors import FrameError, WorkerFailing
from routing.tokens.dispatching.setbacks import Setbacks

FAILED = WorkerFailing("kernel")


def test_a_busy_worker_is_asked_again_in_proportion_to_its_queue() -> None:
    met = Setbacks()
    met.busy("a", 8.0, 0.2, 100.0)
    met.busy("b", 0.0, 0.2, 100.0)
    assert met.held_back(100.1) == {"a", "b"}
    assert met.held_back(101.9) == {"a"}
    assert met.held_back(102.0) == frozenset()


def test_who_refused_the_frame_is_not_asked_again() -> None:
    met = Setbacks()
    met.refused["a"] = FrameError("no")
    assert met.held_back(1e9) == {"a"}


def test_failures_of_one_worker_end_with_its_fence_not_with_the_dispatch() -> None:
    met = Setbacks()
    for at in range(9):
        met.failed("a", 0.2, FAILED, float(at))
    assert met.held_back(8.1) == {"a"}


def test_failures_at_several_workers_are_the_rows_fault() -> None:
    met = Setbacks()
    for worker in ("a", "b", "a"):
        met.failed(worker, 0.2, FAILED, 0.0)
    with pytest.raises(WorkerFailing, match="kernel"):
        met.failed("b", 0.2, FAILED, 0.0)
