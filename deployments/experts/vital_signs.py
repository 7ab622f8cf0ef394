"""How busy an expert worker is and how fast it computes, from running counts."""

from __future__ import annotations

import math

_MEMORY_S = 30.0  # of computing, that the speed looks back
_LEAST_S = 0.5  # between two measures: heartbeats come at once when there is news


class VitalSigns:
    """To be asked with every heartbeat. No clock of its own."""

    def __init__(self, now_s: float) -> None:
        self._then_s = now_s
        self._busy_s = self._work = 0.0
        self._recent_s = self._recent_work = 0.0
        self._busy = 0.0

    def since_last(self, busy_s: float, work: float, now_s: float) -> tuple[float, float]:
        """Return the fraction of its time that the worker computed lately, 0 to 1, and its work (`ExpertCompute.work`)
        per second of computing, lately; 0 before it has computed for a second.
        """
        passed_s, worked_s = now_s - self._then_s, busy_s - self._busy_s
        if passed_s >= _LEAST_S:
            kept = math.exp(-worked_s / _MEMORY_S)
            self._recent_s = kept * self._recent_s + worked_s
            self._recent_work = kept * self._recent_work + work - self._work
            self._then_s, self._busy_s, self._work = now_s, busy_s, work
            self._busy = min(1.0, worked_s / passed_s)
        return self._busy, self._recent_work / self._recent_s if self._recent_s >= 1 else 0.0
