"""Waits for what clients send, bounded in number and in time, so that slow and silent clients keep nobody out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cluster.errors import DeepsplitError, Overloaded, Plane, Reason, RequestTimeout

_RETRY_S = 1.0
T = TypeVar("T")


class _Wait:
    """One wait, which can be ended from outside."""

    def __init__(self, whose: str, least_s: float, most_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        self.whose = whose
        self.until = asyncio.timeout_at(now_s + most_s)
        self.ended_by: DeepsplitError | None = None
        self._safe_until_s = now_s + min(least_s, most_s)

    def end(self, error: DeepsplitError) -> None:
        if self.ended_by is None and not self.until.expired():
            self.ended_by = error
            self.until.reschedule(max(self._safe_until_s, asyncio.get_running_loop().time()))


class Arrivals:
    """Messages of one kind that clients are to send. Belongs to one event loop.

    gRPC receives a message as a whole, up to the largest, once it has been asked for; before that, flow control holds
    back all but its first 64 KiB or so. So no more than `most` are asked for at once, and each is given at least
    `least_s` seconds: while further ones wait for their turn, the oldest of whoever has the most gives way.
    """

    def __init__(self, what: str, most: int, least_s: float, reason: Reason) -> None:
        """`what`, `reason`: in the errors."""
        self._what = what
        self._least_s = least_s
        self._reason = reason
        self._turns = asyncio.Semaphore(most)
        self._queued = 0
        self._waits: dict[_Wait, None] = {}  # the oldest first

    def __len__(self) -> int:
        """Messages that have been asked for, without those whose wait is about to end."""
        return sum(wait.ended_by is None for wait in self._waits)

    async def next(self, whose: str, message: Callable[[], Awaitable[T]], within_s: float) -> T:
        """What `message` brings. Raises RequestTimeout, Overloaded when it gave way, or what `end_all` was given."""
        self._queued += 1
        try:
            if self._turns.locked():
                self.evict()
            await self._turns.acquire()
        finally:
            self._queued -= 1
        wait = _Wait(whose, self._least_s, within_s)
        self._waits[wait] = None
        if self._queued:
            self.evict()
        try:
            async with wait.until:
                return await message()
        except TimeoutError as error:
            late = RequestTimeout(f"{self._what} did not arrive within {within_s:g} s")
            raise wait.ended_by or late from error
        finally:
            del self._waits[wait]
            self._turns.release()

    def evict(self) -> bool:
        """End one wait to make room; whether there was one."""
        waits = [wait for wait in self._waits if wait.ended_by is None]
        if not waits:
            return False
        held = Counter(wait.whose for wait in waits)
        slowest = max(waits, key=lambda wait: held[wait.whose])  # of equals max() takes the first, the oldest
        error = f"{self._what} did not arrive, and others needed its place at this gateway"
        slowest.end(Overloaded(error, retry_after_s=_RETRY_S, plane=Plane.GATEWAY, reason=self._reason))
        return True

    def end_all(self, error: DeepsplitError) -> None:
        """End every wait."""
        for wait in self._waits:
            wait.end(error)
