"""Virtual time: events in order, and a clock that runs them while somebody sleeps or waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from routing.tokens.clock import Clock


class Timeline:
    """One thread, no real time. Events at the same moment happen in the order in which they were planned."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.clock = Clock(lambda: self.now_s, self.sleep)

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Plan an event."""
        heapq.heappush(self._events, (self.now_s + max(0.0, seconds), next(self._order), event))

    def every(self, seconds: float, event: Callable[[], None]) -> None:
        """Plan an event again and again."""

        def again() -> None:
            event()
            self.after(seconds, again)

        self.after(seconds, again)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.wait_for(lambda: False, seconds)

    def wait_for(self, happened: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until something has happened, or for so long; returns whether it has."""
        until_s = self.now_s + seconds
        while not happened():
            if not self._events or self._events[0][0] > until_s:
                self.now_s = max(self.now_s, until_s)
                return happened()
            at_s, _, event = heapq.heappop(self._events)
            # An event may itself have waited, and gone beyond this one's moment.
            self.now_s = max(self.now_s, at_s)
            event()
        return True
