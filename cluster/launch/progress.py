"""What `deepsplit up` says on stderr while it starts: stages, each with the time since the command began."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO


class Stages:
    """Prints `[  1.2 s] stage`; a progress line is printed only when it says something new."""

    def __init__(self, out: TextIO, clock: Callable[[], float]) -> None:
        self._out = out
        self._clock = clock
        self._began = clock()
        self._last = ""

    def say(self, text: str) -> None:
        """One line, now."""
        if text != self._last:
            self._last = text
            print(f"[{self._clock() - self._began:6.1f} s] {text}", file=self._out, flush=True)
