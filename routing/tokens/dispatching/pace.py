"""How long workers take beside each other, and so what part of shared experts' rows each should get.

A dispatch waits for its slowest worker. So every worker's weight goes up or down with the logarithm of its answer time
against the others' in the same dispatches, until they take the same time or have nothing left to give: an integral
controller, in small steps, because several clients do this at once. It needs no model of why a worker is slow: its
processor, its queue, or experts that only it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

_MEMORY = 1 / 64  # of a dispatch in the smoothed times: one step of a model with about 60 MoE layers
_PERIOD_S = 1.0
_STEP = 0.25  # of the logarithm, per period
_MOST = 3.0  # of the logarithm: a weight is changed 20-fold at most
_NOTICED = 0.1  # smaller changes of the logarithm are not worth new routes


class Pace:
    """Thread-safe: numbers are replaced one by one, and a lost update costs nothing."""

    def __init__(self) -> None:
        self._news = False
        self._stepped_s = -math.inf
        self._slowness: dict[str, float] = {}  # worker_id -> smoothed log of its time over the mean of its dispatches
        self._wanted: dict[str, float] = {}  # worker_id -> log of the factor to which it has come
        self._given: dict[str, float] = {}  # that the last factors had

    def answered(self, away_s: Sequence[tuple[str, float]]) -> None:
        """Record how long each worker of one dispatch had its rows, queue and computation, in seconds."""
        if len(away_s) < 2:
            return
        self._news = True
        mean_s = sum(seconds for _, seconds in away_s) / len(away_s)
        for worker_id, seconds in away_s:
            before = self._slowness.get(worker_id, 0.0)
            now = math.log(max(seconds, 1e-6) / max(mean_s, 1e-6))
            self._slowness[worker_id] = before + _MEMORY * (max(-_MOST, min(now, _MOST)) - before)

    def factors(self, workers: Iterable[str], now_s: float) -> Mapping[str, float] | None:
        """Go one step on if it is time and there were answers. Returns the factors by which the weights of these
        workers are to be multiplied, None while they are about what they were. `now_s`: monotonic.
        """
        if not self._news or now_s - self._stepped_s < _PERIOD_S:
            return None
        self._news, self._stepped_s = False, now_s
        wanted = {}
        for worker_id in workers:
            log = self._wanted.get(worker_id, 0.0) - _STEP * self._slowness.get(worker_id, 0.0)
            wanted[worker_id] = max(-_MOST, min(log, _MOST))
        self._slowness = {worker_id: self._slowness.get(worker_id, 0.0) for worker_id in wanted}
        self._wanted = wanted
        if all(abs(log - self._given.get(worker_id, 0.0)) < _NOTICED for worker_id, log in wanted.items()):
            return None
        self._given = wanted
        return {worker_id: math.exp(log) for worker_id, log in wanted.items()}
