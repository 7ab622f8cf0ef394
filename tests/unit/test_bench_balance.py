"""The benchmark of balancing compares with what DeepSeek's EPLB does, and says what it measures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.balance.__main__ import EXPERT_BYTES, OPTIONS, TRACE, as_placement, fleet, measure, measure_shifts
from benchmarks.balance.eplb import device_loads, eplb
from benchmarks.balance.scenarios import README_LE, VECTOR_LE, recorded, scenarios, shifted, skewed
from routing.tokens.balancing import place, score

# What EPLB's README prints for its example.
README_EXPERTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_baseline_is_eplb() -> None:
    expert_LP = eplb(README_LE, 16, groups=4, nodes=2, devices=8)
    assert expert_LP.tolist() == README_EXPERTS
    rows_LG = device_loads(README_LE, expert_LP, 8)
    assert (rows_LG.mean(axis=1) / rows_LG.max(axis=1)).round(3).tolist() == [0.828, 0.805]
    assert device_loads(VECTOR_LE, eplb(VECTOR_LE, 16, 1, 1, 8), 8).max() == 232


def test_the_baseline_is_scored_by_even_shares() -> None:
    expert_LP = eplb(README_LE, 16, groups=4, nodes=2, devices=8)
    workers = fleet(8, 2, 2, 4, (1.0,))
    result = score(as_placement(expert_LP, 12, 8), README_LE, workers, OPTIONS)
    assert result.step_s == pytest.approx(device_loads(README_LE, expert_LP, 8).max(axis=1).sum())
    twice = as_placement(np.array([[0, 0, 1, 2]]), 3, 2)  # two replicas on one device are one
    assert twice.workers_LER.tolist() == [[[0], [1], [1]]]
    assert twice.weights_LER.tolist() == [[[1], [1], [1]]]


def test_205_is_reached() -> None:
    workers = fleet(8, 2, 1, 1, (1.0,))
    assert score(place(VECTOR_LE, workers, OPTIONS), VECTOR_LE, workers, OPTIONS).step_s < 205


@pytest.mark.parametrize("speeds", ["1 : 1", "3 : 1"])
def test_ours_is_never_worse(speeds: str) -> None:
    for scenario in scenarios(recorded(TRACE)):
        if scenario.loads_LE.shape[0] < 10:
            row = measure(scenario, speeds, 1)
            assert row.ours_max < row.eplb_max
            assert row.ours_loss < row.eplb_loss


def test_loads_are_as_skewed_as_they_say() -> None:
    loads_LE = skewed(6, 256, 0.45, seed=1)
    assert np.sort(loads_LE, axis=1)[:, -25:].sum() / loads_LE.sum() == pytest.approx(0.45, abs=0.01)
    assert not np.allclose(shifted(loads_LE, seed=0), loads_LE)


def test_the_trace_holds_what_the_demo_model_chose() -> None:
    trace_NLE = recorded(TRACE)
    assert trace_NLE.shape == (8, 3, 16)
    assert (trace_NLE.sum(axis=2) == 4096 * 4).all()  # tokens of a window, top-4


def test_a_budget_is_kept_in_a_shift() -> None:
    trace_NLE = recorded(TRACE)[:3]
    rows = [row for row in measure_shifts(trace_NLE, layers=2) if row.how.startswith("ours")]
    assert len(rows) == 15
    for row in rows:
        if row.how.endswith("of slots"):
            assert row.moved <= float(row.how.split()[1].rstrip("%,")) / 100
        assert row.moved_gib >= 0
        assert row.mean_max <= 1
    assert EXPERT_BYTES == 44_040_192
