"""When a reply is late, so that its rows go to another holder too, and how often that may happen.

Answer times are estimated as TCP does for its retransmissions (RFC 6298: smoothed mean and mean deviation), for each
power of two of rows by itself, since a prefill's rows take a hundred times as long as a decode step's. Late is what
exceeds the mean by _DEVIATIONS deviations, and a configured least time. Dispatches earn a budget for it, so that when
all workers are slow, nobody makes them slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEAN_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4  # RFC 6298's
_DEVIATIONS = 8  # twice RFC 6298's: a worker's turns vary more than a network does
_KNOWN = 16  # answers from which an estimate counts
_EARNED, _MOST = 0.05, 16.0  # hedges that a dispatch earns, and that can be saved up


@dataclass(slots=True)
class _Estimate:
    mean_s: float
    deviation_s: float
    answers: int = 1


class Lateness:
    """Thread-safe: numbers are replaced one by one, and a lost update costs nothing."""

    def __init__(self, least_s: float) -> None:
        """`least_s`: no reply is late before; infinite for never."""
        self._least_s = least_s
        self._by_size: dict[int, _Estimate] = {}
        self._budget = _MOST

    def answered(self, rows: int, seconds: float) -> None:
        """Record how long after sending a part of so many rows was answered."""
        self._budget = min(_MOST, self._budget + _EARNED)
        known = self._by_size.get(rows.bit_length())
        if known is None:
            self._by_size[rows.bit_length()] = _Estimate(seconds, seconds / 2)
            return
        known.deviation_s += _DEVIATION_GAIN * (abs(seconds - known.mean_s) - known.deviation_s)
        known.mean_s += _MEAN_GAIN * (seconds - known.mean_s)
        known.answers += 1

    def late_after_s(self, rows: int) -> float:
        """Return the seconds after sending from which the reply to a part of so many rows is late."""
        known = self._by_size.get(rows.bit_length())
        if known is None or known.answers < _KNOWN:
            return math.inf
        return max(self._least_s, known.mean_s + _DEVIATIONS * known.deviation_s)

    def spend(self) -> bool:
        """Take one hedge from the budget. Returns whether there was one."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
