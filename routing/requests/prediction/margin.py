"""How much later than predicted first tokens come, so that a promise is kept although predictions are not exact."""

from __future__ import annotations

_KEPT = 0.99  # of admitted requests that are to keep their objective
_STEP = 0.05
_START = 0.2
_MOST = 4.0  # far above one is reached where higher classes take nearly all: what they leave varies much
_COUNTS_FROM = 0.25  # of the budget: errors of shorter predictions break no promise


class Margin:
    """A quantile of (actual - predicted) / predicted, tracked by stochastic approximation (Robbins, Monro 1951): up by
    `_STEP * _KEPT` after each error above it, down by `_STEP * (1 - _KEPT)` after each one below.
    """

    def __init__(self) -> None:
        self.value = _START

    def applied(self, predicted_s: float) -> float:
        """The time within which the first token will almost surely come."""
        return predicted_s * (1 + self.value)

    def observe(self, predicted_s: float, actual_s: float, budget_s: float) -> None:
        """A first token came."""
        if max(predicted_s, actual_s) >= _COUNTS_FROM * budget_s:
            self._track(actual_s > self.applied(predicted_s))

    def missed(self) -> None:
        """A request was let in to wait and had to be refused later."""
        self._track(True)

    def _track(self, above: bool) -> None:
        self.value = min(_MOST, max(0.0, self.value + _STEP * (above - (1 - _KEPT))))
