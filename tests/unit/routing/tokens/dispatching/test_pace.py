"""The factors by which workers' weights are multiplied, with times passed in."""

from __future__ import annotations

import math

import pytest

from routing.tokens.dispatching.pace import Pace


def run(speed: dict[str, float], seconds: int, queue_s: dict[str, float] | None = None) -> dict[str, float]:
    """The parts of the rows that workers of these speeds get of experts that all hold, after a time."""
    pace, parts = Pace(), dict.fromkeys(speed, 1 / len(speed))
    for second in range(seconds):
        for _ in range(200):
            pace.answered([(name, 1e-3 * parts[name] / speed[name] + (queue_s or {}).get(name, 0)) for name in speed])
        factors = pace.factors(speed, float(second))
        if factors is not None:
            parts = {name: factors[name] / sum(factors.values()) for name in speed}
    return parts


def test_rows_are_divided_by_speed() -> None:
    parts = run({"a": 3.0, "b": 1.0, "c": 1.0}, seconds=40)
    assert parts == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2}, rel=0.1)


def test_a_worker_with_a_queue_gets_less() -> None:
    parts = run({"a": 1.0, "b": 1.0}, seconds=120, queue_s={"b": 0.3e-3})
    assert parts["a"] - parts["b"] == pytest.approx(0.3, rel=0.2)


def test_equal_workers_stay_equal_and_cost_no_routes() -> None:
    pace = Pace()
    for second in range(10):
        pace.answered([("a", 1e-3), ("b", 1.02e-3)])
        assert pace.factors("ab", float(second)) is None


def test_nothing_moves_without_answers_or_before_its_time() -> None:
    pace = Pace()
    for _ in range(200):
        pace.answered([("a", 1e-3), ("b", 9e-3)])
    assert pace.factors("ab", 1.0) is not None
    assert pace.factors("ab", 9.0) is None  # no answers since
    pace.answered([("a", 1e-3), ("b", 9e-3)])
    assert pace.factors("ab", 1.5) is None  # too soon
    pace.answered([("a", 1e-3)])  # says nothing of others


def test_factors_are_bounded_and_workers_that_left_are_forgotten() -> None:
    pace = Pace()
    for second in range(100):
        for _ in range(100):
            pace.answered([("a", 0.0), ("b", 1e9)])
        pace.factors("ab", float(second))
    assert all(abs(log) <= 3.0 for log in pace._wanted.values())
    pace.answered([("a", 1e-3), ("c", 1e-3)])
    factors = pace.factors("ac", 1000.0)
    assert factors is None or math.log(factors["c"]) == pytest.approx(0.0, abs=0.1)
    assert set(pace._wanted) == {"a", "c"}
