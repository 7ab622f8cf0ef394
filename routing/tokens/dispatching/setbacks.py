"""What one dispatch met that says nothing of a worker as a whole: who is not asked again, and until when. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.errors import FrameError, WorkerFailing

_BACKOFF_SHARE = 0.25  # of the time that requests wait at a busy worker: by then its queue is that much shorter
# More than a worker takes to fence itself (`fence.FAILED_TURNS`), less than two of them do: rows that kill every kernel
# must not take worker after worker with them.
_MOST_FAILED_ATTEMPTS = 4


@dataclass(slots=True)
class Setbacks:
    """Of one dispatch, whose thread alone uses it."""

    until_s: dict[str, float] = field(default_factory=dict)  # worker_id -> monotonic seconds; it asked for a pause
    refused: dict[str, FrameError] = field(default_factory=dict)  # worker_id -> what it says is wrong with our frame
    failed_at: set[str] = field(default_factory=set)  # workers whose kernels failed on these rows
    _failed_attempts: int = 0

    def busy(self, worker_id: str, queue_s: float, least_s: float, now_s: float) -> None:
        """A worker's queue is full: it is asked again after a part of the time that requests wait there."""
        self.until_s[worker_id] = now_s + max(least_s, _BACKOFF_SHARE * queue_s)

    def failed(self, worker_id: str, pause_s: float, error: WorkerFailing, now_s: float) -> None:
        """A worker's kernel failed: it is asked again after `pause_s`. Raises `error` if it seems that the rows are at
        fault, because they failed time and again and at several workers.
        """
        self.until_s[worker_id] = now_s + pause_s
        self.failed_at.add(worker_id)
        self._failed_attempts += 1
        if self._failed_attempts >= _MOST_FAILED_ATTEMPTS and len(self.failed_at) > 1:
            raise error

    def held_back(self, now_s: float) -> frozenset[str]:
        """Return the workers that are not asked now."""
        paused = (worker_id for worker_id, until_s in self.until_s.items() if until_s > now_s)
        return frozenset((*paused, *self.refused))
