"""When a reply is late, from answer times that are passed in."""

from __future__ import annotations

import math

import pytest

from routing.tokens.dispatching.lateness import Lateness


def test_nothing_is_late_before_times_are_known() -> None:
    lateness = Lateness(0.3)
    for _ in range(15):
        lateness.answered(1, 0.005)
    assert lateness.late_after_s(1) == math.inf
    lateness.answered(1, 0.005)
    assert lateness.late_after_s(1) == 0.3
    assert lateness.late_after_s(1000) == math.inf  # other sizes take other times


def test_slow_and_varying_answers_are_waited_for_longer() -> None:
    steady, varying = Lateness(0.1), Lateness(0.1)
    for at in range(200):
        steady.answered(8, 1.0)
        varying.answered(8, 1.0 + (at % 2) * 0.5)
    assert steady.late_after_s(8) == pytest.approx(1.0, rel=0.01)
    assert varying.late_after_s(8) > 2.5


def test_a_slower_time_is_learned_within_some_answers() -> None:
    lateness = Lateness(0.1)
    for _ in range(100):
        lateness.answered(8, 0.01)
    for _ in range(8):
        lateness.answered(8, 0.5)
    assert lateness.late_after_s(8) > 0.5


def test_hedges_are_a_twentieth_of_the_dispatches_in_the_long_run() -> None:
    lateness, hedged = Lateness(0.1), 0
    while lateness.spend():
        hedged += 1
    assert hedged == 16
    for _ in range(1000):
        lateness.answered(1, 0.01)
        hedged += lateness.spend()
    assert hedged == pytest.approx(16 + 50, abs=1)


def test_an_infinite_least_time_turns_it_off() -> None:
    lateness = Lateness(math.inf)
    for _ in range(100):
        lateness.answered(1, 0.01)
    assert lateness.late_after_s(1) == math.inf
