"""When decode slots and KV tokens become free: the number of releases expected until any time from now.

Each running request ends with its hazard or at its bound; each slot that becomes free is taken by a waiting request at
once, which ends in its turn. So the time at which a waiting request starts is the time of the release it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 48  # of the curve; beyond it, the mean rate
_POINTS_PER_SERVICE = 16  # the curve is three mean service times long
_Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Stay:
    """How long a request will still hold what it holds."""

    slots: float
    kv_tokens: float
    prefill_s: float  # until its first token
    most_s: float  # from there to its bound
    end_per_s: float  # hazard of ending before that

    def mean_s(self) -> float:
        """The request is expected to hold it for so many seconds."""
        if self.end_per_s * self.most_s < 1e-9:
            return self.prefill_s + self.most_s
        return self.prefill_s - math.expm1(-self.end_per_s * self.most_s) / self.end_per_s


class Releases:
    """Expected releases of slots and of KV tokens over time."""

    def __init__(self, running: Sequence[Stay], weight: float, next_ones: Stay) -> None:
        """`running`: a sample of the requests that run, each of which stands for `weight` of them. `next_ones`: a
        typical request of those that take what becomes free.
        """
        mean_s = max(1e-3, next_ones.mean_s())
        self._step_s = mean_s / _POINTS_PER_SERVICE
        times = self._step_s * np.arange(POINTS + 1)
        held = np.array([(stay.slots, stay.kv_tokens) for stay in running]).reshape(-1, 2) * weight
        first = _over(running, times).T @ held  # [points, 2]: slots and KV tokens released until then
        freed = _renewed(first, _over([next_ones], times)[0])
        self._slots, self._kv_tokens = freed[:, 0], freed[:, 1]
        self.slots_per_s, self.kv_tokens_per_s = (held.sum(axis=0) / mean_s).tolist()

    def slots(self, demand_per_s: float) -> Curve:
        """Slots that are left when others first take `demand_per_s`."""
        return Curve(self._slots, self._step_s, self.slots_per_s, demand_per_s)

    def kv_tokens(self, demand_per_s: float) -> Curve:
        """KV tokens, likewise."""
        return Curve(self._kv_tokens, self._step_s, self.kv_tokens_per_s, demand_per_s)


class Curve:
    """Amount that has become free, over time; never falls."""

    def __init__(self, freed: _Floats, step_s: float, freed_per_s: float, taken_per_s: float) -> None:
        self._times = step_s * np.arange(len(freed))
        self._freed = np.maximum.accumulate(np.maximum(0.0, freed - taken_per_s * self._times))
        self._further_per_s = freed_per_s - taken_per_s

    def time_of(self, amount: _Floats) -> _Floats:
        """Seconds until so much has become free; infinite if it never will."""
        freed, times = self._freed, self._times
        found = np.interp(amount, freed, times)
        beyond = amount > freed[-1]
        if beyond.any():
            rate = self._further_per_s
            later = times[-1] + (amount - freed[-1]) / rate if rate > 0 else math.inf
            found = np.where(beyond, later, found)
        return np.where(amount <= 0, 0.0, found)


@dataclass(frozen=True)
class Room:
    """What is free now, and when more becomes free, as one class sees it."""

    free_slots: float
    free_kv_tokens: float
    slots: Curve
    kv_tokens: Curve

    def until(self, slots: _Floats, kv_tokens: _Floats) -> tuple[_Floats, NDArray[np.bool_]]:
        """Seconds until so much has become free, of which what is free now is a part; and whether it is the KV cache
        that is waited for.
        """
        slots, kv_tokens = slots - self.free_slots, kv_tokens - self.free_kv_tokens
        # At least one slot: what is free is in pieces of which none is large enough.
        for_slots_s = self.slots.time_of(np.maximum(1.0, slots))
        for_kv_s = self.kv_tokens.time_of(kv_tokens)
        return np.maximum(for_slots_s, for_kv_s), (for_kv_s > for_slots_s) | ((slots <= 0) & (kv_tokens > 0))


def _over(stays: Sequence[Stay], times: _Floats) -> _Floats:
    """Probability that each has ended by each time: [stays, times]."""
    rows = np.array([(stay.prefill_s, stay.most_s, stay.end_per_s) for stay in stays]).reshape(-1, 3)
    prefill_s, most_s, end_per_s = rows[:, :1], rows[:, 1:2], rows[:, 2:]
    decoding_s = times - prefill_s
    ended = np.where(decoding_s >= most_s, 1.0, -np.expm1(-end_per_s * np.maximum(0.0, decoding_s)))
    return np.where(decoding_s <= 0, 0.0, ended)


def _renewed(first: _Floats, again: _Floats) -> _Floats:
    """Releases by those that run now (`first`), and by those that follow them (`again`: their distribution)."""
    total = np.zeros_like(first)
    steps = np.zeros_like(first)
    for point in range(1, len(first)):
        followed = again[point - 1 : 0 : -1] @ steps[1:point]
        total[point] = np.maximum(total[point - 1], first[point] + followed)
        steps[point] = total[point] - total[point - 1]
    return total
