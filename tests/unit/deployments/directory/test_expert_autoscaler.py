"""How many expert workers the load asks for, with an injected clock."""

from __future__ import annotations

import pytest

from cluster.config import ExpertAutoscaling
from deployments.directory.expert_autoscaler import ExpertAutoscaler

SCALING = ExpertAutoscaling(
    min_workers=2, max_workers=6, target_busy=0.5, upscale_delay_s=10.0, downscale_delay_s=60.0
)


@pytest.mark.parametrize(("busy", "workers"), [(1.5, 3), (1.51, 4), (9.0, 6), (1.0, 2), (0.0, 2), (None, 2)])
def test_as_many_as_do_the_work_at_the_wanted_load(busy: float | None, workers: int) -> None:
    autoscaler = ExpertAutoscaler(SCALING)
    assert autoscaler.wanted(busy, 2, 0.0) == 2
    assert autoscaler.wanted(busy, 2, 9.9) == 2
    assert autoscaler.wanted(busy, 2, 10.0) == workers


def test_fewer_come_later_and_only_if_fewer_are_wanted_all_the_time() -> None:
    autoscaler = ExpertAutoscaler(SCALING)
    for now_s in range(0, 60, 5):
        assert autoscaler.wanted(1.0 if now_s != 30 else 1.9, 5, float(now_s)) == 5
    assert autoscaler.wanted(1.0, 5, 60.0) == 4  # once in that time 4 were wanted
    assert autoscaler.wanted(1.0, 4, 65.0) == 4
    assert autoscaler.wanted(2.0, 4, 100.0) == 4  # as many as there are: the next change waits anew
    assert autoscaler.wanted(1.0, 4, 130.0) == 4
    assert autoscaler.wanted(1.0, 4, 190.0) == 2


def test_a_short_peak_changes_nothing() -> None:
    autoscaler = ExpertAutoscaler(SCALING)
    for now_s in range(100):
        assert autoscaler.wanted(3.0 if now_s % 9 else 1.0, 2, float(now_s)) == 2
