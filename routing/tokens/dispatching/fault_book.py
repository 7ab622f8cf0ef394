"""Keeps the conditions of a client's workers, and reports each change: to the log, once, and to the metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Set

from cluster.errors import DeepsplitError
from monitoring.dispatch_meter import DispatchMeter
from routing.tokens.clock import REAL_CLOCK, Clock
from routing.tokens.dispatching.worker_conditions import WorkerConditions
from routing.tokens.placement import Stamp

logger = logging.getLogger(__name__)


class FaultBook:
    """Thread-safe. Reading `conditions` takes no lock: the value is replaced, never changed."""

    def __init__(self, meter: DispatchMeter | None = None, clock: Clock = REAL_CLOCK) -> None:
        self.conditions = WorkerConditions()
        self._meter = meter
        self._now = clock.monotonic
        self._writing = threading.Lock()
        self._last = ""

    def lost(self, worker_id: str, error: DeepsplitError, request_ids: str = "") -> None:
        """A worker's link broke or it was silent. `request_ids`: the requests whose rows it delays, if any."""
        now_s = self._now()
        self._note(f"last lost: {error}", lambda old: old.lost(worker_id, now_s))
        if self._meter is not None:
            self._meter.worker_lost(error.outcome)
        _log("expert worker lost, its rows go elsewhere: %s", worker_id, error, request_ids)

    def late(self, worker_id: str, error: DeepsplitError, request_ids: str) -> None:
        """A worker takes much longer than usual, and its rows go to others."""
        now_s = self._now()
        self._note(f"last late: {error}", lambda old: old.late(worker_id, now_s))
        _log("expert worker late, its rows go elsewhere too: %s", worker_id, error, request_ids)

    def set_aside(self, worker_id: str, error: DeepsplitError, request_ids: str = "") -> None:
        """A worker can never be used, as `error` says. Reported once for each."""
        if worker_id in self.conditions.aside:
            return
        self._note(f"set aside: {error}", lambda old: old.set_aside(worker_id, error.outcome))
        self._report()
        _log("expert worker set aside, nothing is sent there any more: %s", worker_id, error, request_ids)

    def stale(
        self, worker_id: str, layer: int, experts: Set[int], stamp: Stamp, error: DeepsplitError, request_ids: str
    ) -> None:
        """A worker does not hold experts of a layer that the table with this stamp says it holds."""
        self._note(f"last refused: {error}", lambda old: old.found_stale(worker_id, layer, experts, stamp))
        _log("the placement table is out of date, some rows go elsewhere: %s", worker_id, error, request_ids)

    def answered(self, worker_id: str) -> None:
        """A worker is well."""
        if worker_id in self.conditions.lost_at or worker_id in self.conditions.late_at:
            with self._writing:
                self.conditions = self.conditions.answered(worker_id)

    def adopted(self, stamp: Stamp, live: Set[str]) -> None:
        """A new placement table is in use: forget the workers that are not in it, and what was stale."""
        with self._writing:
            self.conditions = self.conditions.adopted(stamp, live)
        self._report()

    def explain(self) -> str:
        """Return the end of a message that says that nobody is left."""
        return self._last

    def _note(self, what: str, change: Callable[[WorkerConditions], WorkerConditions]) -> None:
        with self._writing:
            self.conditions = change(self.conditions)
            self._last = f"; {what}"

    def _report(self) -> None:
        if self._meter is not None:
            self._meter.set_aside(self.conditions.aside.values())


def _log(message: str, worker_id: str, error: DeepsplitError, request_ids: str) -> None:
    logger.warning(message, error, extra={"fields": {"worker_id": worker_id, "request_id": request_ids}})
