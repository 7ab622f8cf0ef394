"""The links of one client, by worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Set

from cluster.errors import DeepsplitError
from routing.tokens.clock import REAL_CLOCK, Clock
from routing.tokens.link import WorkerLink
from routing.tokens.placement import WorkerEndpoint


class Links:
    """Thread-safe. A link that broke is discarded, and the next use of its worker opens another."""

    def __init__(
        self, open_link: Callable[[WorkerEndpoint], WorkerLink], reply_timeout_s: float, clock: Clock = REAL_CLOCK
    ) -> None:
        """`reply_timeout_s`: nobody waits for one reply for longer."""
        self._open = open_link
        self._now = clock.monotonic
        self._reply_timeout_s = reply_timeout_s
        self._changing = threading.Lock()
        self._live: dict[str, WorkerLink] = {}  # worker_id -> link
        # Of workers that left: monotonic seconds since when, worker_id.
        self._retired: list[tuple[float, str, WorkerLink]] = []
        self._closed = False

    def of(self, worker: WorkerEndpoint) -> WorkerLink:
        """Return a worker's link; opening one does not wait for the connection."""
        link = self._live.get(worker.worker_id)
        if link is None:
            with self._changing:
                link = self._live.get(worker.worker_id)
                if link is None:
                    assert not self._closed, "dispatch on a client that is closed"
                    link = self._live[worker.worker_id] = self._open(worker)
        return link

    def discard(self, worker_id: str, link: WorkerLink) -> bool:
        """Close a link that broke. Returns whether this is the first to say so."""
        with self._changing:
            first = self._live.get(worker_id) is link
            if first:
                del self._live[worker_id]
            elif known := [one for one in self._retired if one[2] is link]:
                first = True
                self._retired.remove(known[0])
        link.close()
        return first

    def prepare(self, workers: Iterable[WorkerEndpoint]) -> None:
        """Begin to connect to workers before the first rows go there."""
        for worker in workers:
            self.of(worker)

    def retire_all_but(self, live: Set[str]) -> None:
        """Let go of the workers that left the placement: their links close once nobody waits for a reply."""
        now = self._now()
        with self._changing:
            for worker_id in self._live.keys() - live:
                self._retired.append((now, worker_id, self._live.pop(worker_id)))

    def tend(self) -> list[tuple[str, DeepsplitError]]:
        """Break the wait of receivers whose deadline has passed, and close retired links. Returns the workers whose
        links broke while nobody waited for a reply, and why; they are discarded.
        """
        now = self._now()
        broke = []
        for worker_id, link in list(self._live.items()):
            link.tend(now)
            if (error := link.broken) is not None and link.idle and self.discard(worker_id, link):
                broke.append((worker_id, error))
        if self._retired:
            self._tend_retired(now)
        return broke

    def _tend_retired(self, now: float) -> None:
        with self._changing:
            over = [one for one in self._retired if one[2].idle or now - one[0] > self._reply_timeout_s]
            self._retired = [one for one in self._retired if one not in over]
            waiting = list(self._retired)
        for _, _, link in over:
            link.close()
        for _, _, link in waiting:
            link.tend(now)

    def close(self) -> None:
        """Close all, for good."""
        with self._changing:
            self._closed = True
            links = [*self._live.values(), *(link for _, _, link in self._retired)]
            self._live.clear()
            self._retired.clear()
        for link in links:
            link.close()
