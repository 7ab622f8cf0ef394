"""Times the stages of one dispatch for the metrics. Nothing is decided by what it holds."""

from __future__ import annotations

import time

from monitoring.dispatch_meter import DispatchSample

_BLOCKED_S = 20e-6  # a reply that took no longer to read than this had arrived before


class Stopwatch:
    """Writes a DispatchSample as its dispatch goes on; one object per dispatch, of one thread at a time."""

    __slots__ = ("_began", "_last_s", "_meanwhile_at", "_sent_at", "_slowest", "sample")

    def __init__(self, rows: int, now: float) -> None:
        self.sample = DispatchSample(rows)
        self._began = now  # monotonic seconds, as all of these
        self._sent_at = self._meanwhile_at = now
        self._slowest: tuple[float, float, float] | None = None  # total, queue and compute seconds of a worker
        self._last_s = 0.0  # when the last reply came

    def sent(self, pack_s: float, send_s: float, nbytes: int) -> None:
        """All frames of this attempt are with gRPC."""
        self._sent_at = time.monotonic()
        self.sample.pack_s += pack_s
        self.sample.send_s += send_s
        self.sample.bytes_out += nbytes

    def meanwhile_done(self) -> None:
        """The shared expert, which runs while rows are away, is done."""
        self._meanwhile_at = time.monotonic()
        self.sample.shared_s = self._meanwhile_at - self._sent_at

    def reply(self, worker_id: str, queue_s: float, compute_s: float, nbytes: int) -> None:
        """One worker's whole reply came."""
        self._last_s = time.monotonic()
        away_s = queue_s + compute_s
        self.sample.workers.append((worker_id, away_s))
        self.sample.bytes_in += nbytes
        if self._slowest is None or away_s > self._slowest[0]:
            self._slowest = (away_s, queue_s, compute_s)

    def collected(self) -> None:
        """Every part came back or was lost: how long the slowest worker took, and what is left for the network."""
        if self._slowest is None:
            return
        away_s, queue_s, compute_s = self._slowest
        sample, self._slowest = self.sample, None
        sample.wait_s += queue_s
        sample.compute_s += compute_s
        if self._last_s - self._meanwhile_at > _BLOCKED_S:
            sample.return_s = (sample.return_s or 0.0) + max(0.0, self._last_s - self._sent_at - away_s)

    def ended(self) -> None:
        """The dispatch is over."""
        self.sample.total_s = time.monotonic() - self._began
