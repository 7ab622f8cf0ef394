"""The tick runs twenty times a second on the loop that carries the streams."""

from __future__ import annotations

import pytest

from benchmarks.admission_tick import WAITING, Full, measured


@pytest.mark.parametrize("replicas", [4, 64])
def test_a_tick_with_a_full_queue_takes_less_than_two_milliseconds(replicas: int) -> None:
    full = Full(replicas)
    quickest = min(measured(full.tick, full, 0.05, calls=5)["p50_ms"] for _ in range(10))  # this machine has other work
    assert quickest < 2.0
    assert full.admission.waiting() == WAITING
