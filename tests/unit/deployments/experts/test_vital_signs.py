"""Busy fraction and speed of a worker, from counts."""

from __future__ import annotations

import pytest

from deployments.experts.vital_signs import VitalSigns


def test_the_busy_fraction_is_of_the_time_since_the_last_call() -> None:
    signs = VitalSigns(100.0)
    assert signs.since_last(0.5, 0, 102.0)[0] == pytest.approx(0.25)
    assert signs.since_last(0.5, 0, 103.0)[0] == 0
    assert signs.since_last(9.5, 0, 104.0)[0] == 1.0  # several threads
    assert signs.since_last(9.5, 0, 104.1)[0] == 1.0  # too soon to say anything else


def test_the_speed_is_of_the_computing_and_follows_it() -> None:
    signs = VitalSigns(0.0)
    assert signs.since_last(0.5, 500, 10.0)[1] == 0  # not known yet
    assert signs.since_last(2.0, 2000, 20.0)[1] == pytest.approx(1000)
    assert signs.since_last(2.0, 2000, 99.0)[1] == pytest.approx(1000)  # idle
    assert signs.since_last(202.0, 102_000, 400.0)[1] == pytest.approx(500, rel=0.01)  # slower now
