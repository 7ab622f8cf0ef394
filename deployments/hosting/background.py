"""Tasks that must run as long as their process serves: one that ends is noticed, and health checks say so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine


class BackgroundTasks:
    """The background tasks of one server. Belongs to one event loop."""

    def __init__(self, logger: logging.Logger) -> None:
        """`logger` hears at once of a task that ends."""
        self._logger = logger
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ended: str | None = None  # which task ended first, and why

    def start(self, name: str, coroutine: Coroutine[object, object, None]) -> None:
        """Run it until `cancel`. `name` says what it does, as in "the tick of admission"."""
        assert name not in self._running, f"{name} runs already"
        task = self._running[name] = asyncio.create_task(coroutine, name=name)
        task.add_done_callback(self._note_end)

    def check(self) -> None:
        """Raises RuntimeError that names the first task that ended and why."""
        if self._ended is not None:
            raise RuntimeError(self._ended)

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their ends."""
        for task in self._running.values():
            task.remove_done_callback(self._note_end)
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._running.clear()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        why = "was cancelled" if task.cancelled() else f"failed: {error!r}" if error else "returned"
        self._logger.error("background task ended: %s %s", task.get_name(), why, exc_info=error)
        if self._ended is None:
            self._ended = f"{task.get_name()} {why}; this process must be replaced"
