"""Keeps an attention replica's placement file at the directory's latest table."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.directory.members import AttentionMember
from deployments.directory.replica import LONG_POLL_S
from routing.tokens.placement import NO_TABLE, PlacementFile, Stamp

RETRY_S = 1.0
_ANSWER_TIMEOUT_S = LONG_POLL_S + 10.0

logger = logging.getLogger(__name__)


class PlacementFollower:
    """Long-polls the directory on behalf of the engine's processes, which have no connection to Ray.

    It is a thread, not a task: vLLM blocks the replica's event loop until its engine is up, and the engine waits for
    the first table. While the directory is away, the last table stays in force.
    """

    def __init__(self, directory: DeploymentHandle, file: PlacementFile, member: Callable[[], AttentionMember]) -> None:
        """`member` returns what the replica registers with at this moment."""
        self._directory = directory
        self._file = file
        self._member = member
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="placement-follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End within one long poll, without waiting for that."""
        self._stop.set()

    def _follow(self) -> None:
        seen = NO_TABLE
        while not self._stop.is_set():
            try:
                asked = self._directory.poll_table.remote(seen, self._member())
                answer: tuple[Stamp, bytes] | None = asked.result(timeout_s=_ANSWER_TIMEOUT_S)
                if answer is not None and not self._stop.is_set():
                    stamp, table = answer
                    self._file.write_encoded(table)
                    seen = stamp
            except (RayError, RayServeException, TimeoutError, OSError) as error:
                logger.warning("placement table %d stays: %s: %s", seen.n, type(error).__name__, error)
                self._stop.wait(RETRY_S)
