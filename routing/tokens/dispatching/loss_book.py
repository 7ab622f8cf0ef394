"""Which workers were lost lately, and so get no rows for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Set

logger = logging.getLogger(__name__)

_NOBODY: frozenset[str] = frozenset()


class LossBook:
    """Thread-safe. Reading takes no lock: the dictionary is replaced, never changed."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._lost_at: dict[str, float] = {}  # worker_id -> monotonic seconds of its last loss
        self._last = ""

    def lose(self, worker_id: str, error: Exception, request_ids: str) -> None:
        """Record a loss, and log it with the ids of the requests whose rows it delays."""
        with self._writing:
            self._lost_at = {**self._lost_at, worker_id: time.monotonic()}
            self._last = f"; last lost: {error}"
        fields = {"worker_id": worker_id, "request_id": request_ids}
        logger.warning("expert worker lost, its rows go elsewhere: %s", error, extra={"fields": fields})

    def answered(self, worker_id: str) -> None:
        """Record that a worker is well."""
        if worker_id in self._lost_at:
            with self._writing:
                self._lost_at = {lost: at for lost, at in self._lost_at.items() if lost != worker_id}

    def keep(self, live: Set[str]) -> None:
        """Drop all but these workers."""
        with self._writing:
            self._lost_at = {lost: at for lost, at in self._lost_at.items() if lost in live}

    def within(self, pause_s: float) -> frozenset[str]:
        """Return the workers that were lost in the last `pause_s` seconds."""
        lost_at = self._lost_at
        if not lost_at:
            return _NOBODY
        since = time.monotonic() - pause_s
        return frozenset(worker_id for worker_id, at in lost_at.items() if at > since)

    def explain(self) -> str:
        """Return the end of a message that says that nobody is left."""
        return self._last
