"""An event loop whose clock does not wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class ClockedLoop(asyncio.SelectorEventLoop):
    """Whenever nothing is left to do, its time goes on to the next timer at once."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        if not self._ready and timers:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, min(timers))
        super()._run_once()  # type: ignore[misc]


def run(scenario: Coroutine[object, object, None]) -> None:
    with asyncio.Runner(loop_factory=ClockedLoop) as runner:
        runner.run(scenario)
