"""The end of one request: its own deadline, or the gateway's, whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from cluster.errors import DeepsplitError

T = TypeVar("T")


class Deadline:
    """Bounds every wait of one request, which waits for one thing at a time. `cut` ends it early."""

    def __init__(self, at_s: float, error: DeepsplitError) -> None:
        """`at_s` in the running event loop's time; `error` is raised when it has passed."""
        self._at_s = at_s
        self._error = error
        self._waiting: asyncio.Timeout | None = None

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """The awaitable's result. Cancels it and raises the deadline's error when time is up."""
        try:
            async with asyncio.timeout_at(self._at_s) as self._waiting:
                return await awaitable
        except TimeoutError as error:
            raise self._error from error
        finally:
            self._waiting = None

    def cut(self, error: DeepsplitError) -> None:
        """End the request now, in the middle of a wait or at the next one."""
        self._error = error
        self._at_s = asyncio.get_running_loop().time()
        if self._waiting is not None:
            self._waiting.reschedule(self._at_s)
