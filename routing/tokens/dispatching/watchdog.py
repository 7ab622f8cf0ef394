"""The client's background thread: what must happen whether or not a dispatch is under way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)


class Watchdog:
    """Does each of its chores every `interval_s`. A chore that fails is logged, once per kind of error in a row."""

    def __init__(self, interval_s: float, chores: Sequence[Callable[[], object]]) -> None:
        self._interval_s = interval_s
        self._chores = chores
        self._failing: dict[Callable[[], object], str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatch-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for chore in self._chores:
                try:
                    chore()
                    self._failing.pop(chore, None)
                except Exception as error:  # the others must go on: a hung worker is found by one of them
                    if self._failing.get(chore) != repr(error):
                        logger.warning("dispatch watchdog: %r", error, exc_info=error)
                    self._failing[chore] = repr(error)
