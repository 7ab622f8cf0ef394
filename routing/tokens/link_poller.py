"""Moves large frames on while the thread that sent them does other work."""

from __future__ import annotations

import threading
from typing import Protocol

_LOOK_S = 0.002  # at one link, before the next link's turn


class Attended(Protocol):
    """A link, as far as its poller knows it."""

    def attend(self, seconds: float) -> bool:
        """Move bytes for at most so long; returns whether there may be more to move."""


class LinkPoller:
    """One thread for the links of a client, asleep unless one of them has asked for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._links: list[Attended] = []
        self._stopped = False
        self._thread: threading.Thread | None = None

    def attend(self, link: Attended) -> None:
        """Look after a link until its `attend` returns False."""
        with self._changed:
            if link not in self._links:
                self._links.append(link)
                self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="link-poller", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._links and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                link = self._links.pop(0)
            if link.attend(_LOOK_S):
                with self._changed:
                    if link not in self._links:
                        self._links.append(link)
