"""When decode slots and KV tokens become free: the number of releases expected until any time from now.

Each running request ends with its hazard or at its bound; each slot that becomes free is taken by a waiting request at
once, which ends in its turn. So the time at which a waiting request starts is the time of the release it needs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

POINTS = 48  # of the curve; beyond it, the mean rate
_POINTS_PER_SERVICE = 16  # the curve is three mean service times long
_MOST_SAMPLED = 128  # running requests that are looked at one by one


@dataclass(frozen=True, slots=True)
class Stay:
    """How long a request will still hold what it holds."""

    slots: float
    kv_tokens: float
    prefill_s: float  # until its first token
    most_s: float  # from there to its bound
    end_per_s: float  # hazard of ending before that

    def mean_s(self) -> float:
        """Expected."""
        if self.end_per_s * self.most_s < 1e-9:
            return self.prefill_s + self.most_s
        return self.prefill_s - math.expm1(-self.end_per_s * self.most_s) / self.end_per_s

    def over(self, by_s: float) -> float:
        """Probability that it has ended by then."""
        decoding_s = by_s - self.prefill_s
        if decoding_s <= 0:
            return 0.0
        return 1.0 if decoding_s >= self.most_s else -math.expm1(-self.end_per_s * decoding_s)


class Releases:
    """Expected releases of slots and of KV tokens over time."""

    def __init__(self, running: Sequence[Stay], next_ones: Stay) -> None:
        """`next_ones`: a typical request of those that take what becomes free."""
        mean_s = max(1e-3, next_ones.mean_s())
        self._step_s = mean_s / _POINTS_PER_SERVICE
        every = -(-len(running) // _MOST_SAMPLED) if running else 1
        sample = running[::every]
        slots, kv_tokens = [0.0] * (POINTS + 1), [0.0] * (POINTS + 1)
        for stay in sample:
            for point in range(1, POINTS + 1):
                share = stay.over(point * self._step_s)
                slots[point] += share * stay.slots
                kv_tokens[point] += share * stay.kv_tokens
        again = [next_ones.over(point * self._step_s) for point in range(POINTS + 1)]
        scale = len(running) / max(1, len(sample))
        self._slots = _renewed(slots, again, scale)
        self._kv_tokens = _renewed(kv_tokens, again, scale)
        self.slots_per_s = sum(stay.slots for stay in sample) * scale / mean_s
        self.kv_tokens_per_s = sum(stay.kv_tokens for stay in sample) * scale / mean_s

    def slots(self, demand_per_s: float) -> Curve:
        """Slots that are left when others first take `demand_per_s`."""
        return Curve(self._slots, self._step_s, self.slots_per_s, demand_per_s)

    def kv_tokens(self, demand_per_s: float) -> Curve:
        """KV tokens, likewise."""
        return Curve(self._kv_tokens, self._step_s, self.kv_tokens_per_s, demand_per_s)


class Curve:
    """Amount that has become free, over time; never falls."""

    def __init__(self, freed: Sequence[float], step_s: float, freed_per_s: float, taken_per_s: float) -> None:
        self._step_s = step_s
        self._further_per_s = freed_per_s - taken_per_s
        self._freed = []
        most = 0.0
        for point, amount in enumerate(freed):
            most = max(most, amount - taken_per_s * point * step_s)
            self._freed.append(most)

    def time_of(self, amount: float) -> float:
        """Seconds until so much has become free; infinite if it never will."""
        if amount <= 0:
            return 0.0
        point = bisect_left(self._freed, amount)
        if point < len(self._freed):
            before, after = self._freed[point - 1], self._freed[point]
            return (point - 1 + (amount - before) / (after - before)) * self._step_s
        if self._further_per_s <= 0:
            return math.inf
        return (len(self._freed) - 1) * self._step_s + (amount - self._freed[-1]) / self._further_per_s


@dataclass(frozen=True)
class Room:
    """What is free now, and when more becomes free, as one class sees it."""

    free_slots: float
    free_kv_tokens: float
    slots: Curve
    kv_tokens: Curve

    def until(self, slots: float, kv_tokens: float) -> tuple[float, bool]:
        """Seconds until so much has become free, of which what is free now is a part; and whether it is the KV cache
        that is waited for.
        """
        slots, kv_tokens = slots - self.free_slots, kv_tokens - self.free_kv_tokens
        # At least one slot: what is free is in pieces of which none is large enough.
        for_slots_s = self.slots.time_of(max(1.0, slots))
        for_kv_s = self.kv_tokens.time_of(kv_tokens)
        return max(for_slots_s, for_kv_s), for_kv_s > for_slots_s or slots <= 0 < kv_tokens


def _renewed(first: Sequence[float], again: Sequence[float], scale: float) -> list[float]:
    """Releases by those that run now (`first`), and by those that follow them (`again`: their distribution)."""
    total = [0.0] * len(first)
    steps = [0.0] * len(first)
    for point in range(1, len(first)):
        followed = sum(steps[start] * again[point - start] for start in range(1, point))
        total[point] = max(total[point - 1], first[point] * scale + followed)
        steps[point] = total[point] - total[point - 1]
    return total
