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
        self.safe_until_s = now_s + min(least_s, most_s)

    def end(self, error: DeepsplitError, not_before_s: float = 0.0) -> None:
        if not self.until.expired():
            self.ended_by = error
            self.until.reschedule(max(not_before_s, asyncio.get_running_loop().time()))


class Arrivals:
    """Messages of one kind that clients are to send. Belongs to one event loop.

    gRPC receives a message as a whole, up to the largest, once it has been asked for; before that, flow control holds
    back all but its first 64 KiB or so. So no more than `most` are asked for at once, and each is given at least
    `least_s` seconds: while further ones wait, the oldest of whoever has the most gives way (to others only if
    they have fewer), and the next turn is for whoever has the fewest.
    """

    def __init__(self, what: str, most: int, least_s: float, reason: Reason) -> None:
        """`what`, `reason`: in the errors."""
        self._what = what
        self._free = most
        self._least_s = least_s
        self._reason = reason
        self._waits: dict[_Wait, None] = {}  # the oldest first
        self._queue: dict[asyncio.Future[None], str] = {}  # for a turn: whose

    def __len__(self) -> int:
        """Messages that have been asked for, without those whose wait is about to end."""
        return sum(wait.ended_by is None for wait in self._waits)

    async def next(self, whose: str, message: Callable[[], Awaitable[T]], within_s: float) -> T:
        """What `message` brings. Raises RequestTimeout, Overloaded when it gave way, or what `end_all` was given."""
        await self._turn(whose)
        wait = _Wait(whose, self._least_s, within_s)
        try:
            async with wait.until:
                self._waits[wait] = None
                self._make_room()
                return await message()
        except TimeoutError as error:
            late = RequestTimeout(f"{self._what} did not arrive within {within_s:g} s")
            raise wait.ended_by or late from error
        finally:
            del self._waits[wait]
            self._release()

    def evict(self, whose: str | None = None) -> bool:
        """End one wait to make room, for a further one of `whose` or for something else; whether there was one."""
        held = self._held()
        most = max(
            (
                wait for wait in self._waits
                if wait.ended_by is None and (whose in (None, wait.whose) or held[wait.whose] > held[whose])
            ),
            key=lambda wait: held[wait.whose], default=None,
        )  # fmt: skip
        if most is None:
            return False
        error = f"{self._what} did not arrive, and others needed its place at this gateway"
        refusal = Overloaded(error, retry_after_s=_RETRY_S, plane=Plane.GATEWAY, reason=self._reason)
        most.end(refusal, most.safe_until_s)
        return True

    def end_all(self, error: DeepsplitError) -> None:
        """End every wait, now."""
        for wait in self._waits:
            wait.end(error)

    async def _turn(self, whose: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue[turn] = whose
        self._make_room()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()
            raise
        finally:
            del self._queue[turn]

    def _release(self) -> None:
        if (turn := self._next_turn()) is None:
            self._free += 1
        else:
            turn.set_result(None)

    def _next_turn(self) -> asyncio.Future[None] | None:
        held = self._held()
        queue = [turn for turn in self._queue if not turn.done()]
        return min(queue, key=lambda turn: held[self._queue[turn]], default=None)  # of equals the oldest

    def _make_room(self) -> None:
        """One at a time: whoever is called next looks again."""
        if not self._queue or any(wait.ended_by is not None for wait in self._waits):
            return
        if (turn := self._next_turn()) is not None:
            self.evict(self._queue[turn])

    def _held(self) -> Counter[str | None]:
        """Places by whose they are, those that somebody has just been called to included."""
        called = (whose for turn, whose in self._queue.items() if turn.done())
        return Counter([*(wait.whose for wait in self._waits), *called])
