"""Keeps an attention replica's placement file at the directory's latest table."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable

from ray.serve.handle import DeploymentHandle

from deployments.directory.members import AttentionMember
from deployments.directory.replica import LONG_POLL_S
from routing.tokens.placement import NO_TABLE, PlacementFile, Stamp
from routing.tokens.routed_tokens import RoutedTokens

RETRY_S = 1.0
_TELL_S = 5.0
_ANSWER_TIMEOUT_S = LONG_POLL_S + 10.0

logger = logging.getLogger(__name__)


class PlacementFollower:
    """Long-polls the directory on behalf of the engine's processes, which have no connection to Ray.

    It is a thread, not a task: vLLM blocks the replica's event loop until its engine is up, and the engine waits for
    the first table. While the directory is away, the last table stays in force.
    """

    def __init__(
        self,
        directory: DeploymentHandle,
        file: PlacementFile,
        member: Callable[[], AttentionMember],
        tokens: Callable[[], RoutedTokens | None],
    ) -> None:
        """`member` returns what the replica registers with at this moment, `tokens` what its experts had so far."""
        self._directory = directory
        self._file = file
        self._member = member
        self._tokens = tokens
        self._told_s = -math.inf
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
                asked = self._directory.poll_table.remote(seen, self._member(), self._tokens_to_tell())
                answer: tuple[Stamp, bytes] | None = asked.result(timeout_s=_ANSWER_TIMEOUT_S)
                if answer is not None and not self._stop.is_set():
                    stamp, table = answer
                    self._file.write_encoded(table)
                    seen = stamp
            except (Exception, asyncio.CancelledError) as error:  # whatever went wrong there; the thread must live on
                logger.warning("placement table %d stays: %s: %s", seen.n, type(error).__name__, error)
                self._stop.wait(RETRY_S)

    def _tokens_to_tell(self) -> RoutedTokens | None:
        """Return the tokens once in a while: they have 120 KiB for 58 layers of 256 experts."""
        if time.monotonic() - self._told_s < _TELL_S:
            return None
        self._told_s = time.monotonic()
        return self._tokens()
