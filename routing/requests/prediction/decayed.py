"""What was seen lately: rates, means and linear fits in which older observations count less.

Time is passed in and never goes back. Each forgets with time, so that what is no longer observed returns to its prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_OUTLIER = 5.0  # an observation counts as at most this many times what was expected


class Rate:
    """Amount per second over about the last `memory_s` seconds."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._sum = 0.0
        self._seen_s = 0.0  # decayed like the sum, so that a young rate is not too low
        self._at_s: float | None = None

    def add(self, amount: float, now_s: float) -> None:
        """`amount` came at `now_s`."""
        self._sum, self._seen_s = self._until(now_s)
        self._sum += amount
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)

    def per_s(self, now_s: float) -> float:
        """Zero until a second of time has been seen: a burst of a moment says nothing about a rate."""
        amount, seen_s = self._until(now_s)
        return amount / seen_s if seen_s >= min(1.0, 0.5 * self._memory_s) else 0.0

    def _until(self, now_s: float) -> tuple[float, float]:
        """Sum and time seen, decayed until now."""
        elapsed_s = 0.0 if self._at_s is None else now_s - self._at_s
        if elapsed_s <= 0:
            return self._sum, self._seen_s
        kept = math.exp(-elapsed_s / self._memory_s)
        return self._sum * kept, self._seen_s * kept + self._memory_s * (1 - kept)


class Mean:
    """Mean of about the last `1 / weight` observations; the prior until the first."""

    def __init__(self, prior: float, weight: float) -> None:
        self.value = prior
        self._weight = weight
        self._count = 0

    def add(self, value: float) -> None:
        """The first observations count more, so that the prior is soon gone."""
        self._count += 1
        self.value += max(self._weight, 1 / self._count) * (value - self.value)


class Fit:
    """Least squares y = sum(coefficient_i * x_i) with coefficients >= 0, decayed, held to a prior by a ridge."""

    def __init__(self, prior: Sequence[float], ridge: Sequence[float], memory_s: float) -> None:
        """`ridge[i]`: how strongly coefficient i is held, as the sum of x_i squared that equals the prior's weight."""
        self._prior, self._ridge = np.array(prior), np.array(ridge)
        self._memory_s = memory_s
        self._xx = np.zeros((len(prior), len(prior)))
        self._xy = np.zeros(len(prior))
        self._count = 0.0
        self._at_s = -math.inf
        self._solved: tuple[float, ...] | None = tuple(prior)

    def observe(self, x: Sequence[float], y: float, now_s: float) -> None:
        """One observation; far outliers are cut."""
        if self._count > 10:
            expected = self.predict(x)
            y = min(y, _OUTLIER * max(expected, 1e-6))
        kept = math.exp(min(0.0, (self._at_s - now_s) / self._memory_s))
        self._at_s = max(self._at_s, now_s)
        self._count = self._count * kept + 1
        row = np.array(x)
        self._xx = self._xx * kept + row[:, None] * row
        self._xy = self._xy * kept + row * y
        self._solved = None

    def predict(self, x: Sequence[float]) -> float:
        """y at x."""
        return sum(c * xi for c, xi in zip(self.coefficients(), x, strict=True))

    def coefficients(self) -> tuple[float, ...]:
        """The fit as of the last observation."""
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def forget(self, now_s: float) -> None:
        """Let time pass without an observation."""
        kept = math.exp(min(0.0, (self._at_s - now_s) / self._memory_s))
        if kept < 0.9:
            self._at_s = now_s
            self._count *= kept
            self._xx, self._xy = self._xx * kept, self._xy * kept
            self._solved = None

    def _solve(self) -> tuple[float, ...]:
        """Coefficients that come out negative are set to zero and the rest is solved again."""
        xx, xy = self._xx + np.diag(self._ridge), self._xy + self._ridge * self._prior
        found, free = np.zeros(len(xy)), np.arange(len(xy))
        while len(free):
            solution = np.linalg.solve(xx[np.ix_(free, free)], xy[free])
            if solution.min() >= 0:
                found[free] = solution
                break
            free = free[solution >= 0]
        return tuple(found.tolist())
