"""How busy an expert worker is and how fast it computes, from running counts."""

from __future__ import annotations

import math

_MEMORY_S = 30.0  # of computing, that the rate looks back


class VitalSigns:
    """To be asked with every heartbeat. No clock of its own."""

    def __init__(self, now_s: float) -> None:
        self._then_s = now_s
        self._busy_s = 0.0
        self._pairs = 0
        self._recent_s = self._recent_pairs = 0.0

    def since_last(self, busy_s: float, pairs: int, now_s: float) -> tuple[float, float]:
        """Return the fraction of its time that the worker computed since the last call, 0 to 1, and the pairs of row
        and expert per second of computing, lately; 0 before it has computed for a second.
        """
        passed_s, worked_s, done = now_s - self._then_s, busy_s - self._busy_s, pairs - self._pairs
        self._then_s, self._busy_s, self._pairs = now_s, busy_s, pairs
        kept = math.exp(-worked_s / _MEMORY_S)
        self._recent_s, self._recent_pairs = kept * self._recent_s + worked_s, kept * self._recent_pairs + done
        busy = min(1.0, worked_s / passed_s) if passed_s > 0 else 0.0
        return busy, self._recent_pairs / self._recent_s if self._recent_s >= 1 else 0.0
