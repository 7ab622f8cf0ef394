"""When an expert worker takes itself out of service. Pure but for the log: no threads, no clock of its own."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

FAILED_TURNS = 3  # in a row: one may be a moment without memory
_KNOWN_AFTER = 200  # turns, of which the longest tells how long one may take
_TIMES_LONGEST, _LEAST_S = 20.0, 10.0  # a turn that takes so much longer, and so long, hangs
_STEP_S = 2.0  # between two looks at most: the process itself stood still in what is more

logger = logging.getLogger(__name__)


class Fence:
    """Closes once, for good: a worker whose kernels fail or hang says so and is replaced by a new process.

    Reading `reason` is thread-safe; `failed` and `computed` are called by the thread that computes.
    """

    def __init__(self, hung_after_s: float) -> None:
        """`hung_after_s`: no turn takes longer; its callers have given up by then."""
        self.reason: str | None = None  # why the worker computes nothing any more
        self._hung_after_s = hung_after_s
        self._failed = 0  # turns in a row
        self._turns = 0
        self._longest_s = 0.0
        self._looked_s = 0.0  # at this time of the present turn
        self._counted_s = 0.0  # of the present turn, without what the process stood still

    def computed(self, took_s: float) -> None:
        """A turn was computed, in so many seconds."""
        self._failed = 0
        self._turns += 1
        self._longest_s = max(self._longest_s, took_s)

    def failed(self, error: BaseException) -> None:
        """Nothing of a turn could be computed."""
        self._failed += 1
        if isinstance(error, torch.AcceleratorError):  # the process's context on the device is gone
            self._close(f"its device failed: {error!r}")
        elif self._failed >= FAILED_TURNS:
            self._close(f"{self._failed} turns of the experts in a row failed, the last with {error!r}")

    def look(self, computing_s: float) -> str | None:
        """Take note of how long the present turn has been going on (0: there is none). Returns `reason`. To be called
        each second or so.
        """
        if computing_s < self._looked_s:  # another turn
            self._looked_s = self._counted_s = 0.0
        self._counted_s += min(computing_s - self._looked_s, _STEP_S)
        self._looked_s = computing_s
        if computing_s > self._hung_after_s:
            self._close(
                f"one turn of the experts has been computed for more than dispatch.call_timeout_s "
                f"({self._hung_after_s:.0f} s): its callers have given up, and the kernel seems to hang"
            )
        elif self._turns >= _KNOWN_AFTER and self._counted_s > max(_LEAST_S, _TIMES_LONGEST * self._longest_s):
            self._close(
                f"one turn of the experts has been computed for {self._counted_s:.0f} s, and the longest of "
                f"{self._turns} before took {self._longest_s:.1f} s: the kernel seems to hang"
            )
        return self.reason

    def _close(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            logger.error("this worker takes no more work and asks to be replaced: %s", reason)
