"""The links of one client, by worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Set

from routing.tokens.link import WorkerLink
from routing.tokens.placement import WorkerEndpoint


class Links:
    """Thread-safe. A link that broke is discarded, and the next use of its worker opens another."""

    def __init__(self, open_link: Callable[[WorkerEndpoint], WorkerLink], reply_timeout_s: float) -> None:
        """`reply_timeout_s`: nobody waits for one reply for longer."""
        self._open = open_link
        self._reply_timeout_s = reply_timeout_s
        self._changing = threading.Lock()
        self._live: dict[str, WorkerLink] = {}  # worker_id -> link
        self._retired: list[tuple[float, WorkerLink]] = []  # monotonic seconds since when, of workers that left
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
        """Close a link that broke. Returns whether it was the worker's current one."""
        with self._changing:
            current = self._live.get(worker_id) is link
            if current:
                del self._live[worker_id]
        link.close()
        return current

    def prepare(self, workers: Iterable[WorkerEndpoint]) -> None:
        """Begin to connect to workers before the first rows go there."""
        for worker in workers:
            self.of(worker)

    def retire_all_but(self, live: Set[str]) -> None:
        """Let go of the workers that left the placement: their links close once nobody waits for a reply."""
        now = time.monotonic()
        with self._changing:
            for worker_id in self._live.keys() - live:
                self._retired.append((now, self._live.pop(worker_id)))

    def tend(self) -> None:
        """Break the wait of receivers whose deadline has passed, and close retired links."""
        now = time.monotonic()
        for link in list(self._live.values()):
            link.tend(now)
        if not self._retired:
            return
        with self._changing:
            over = [link for since, link in self._retired if link.idle or now - since > self._reply_timeout_s]
            self._retired = [(since, link) for since, link in self._retired if link not in over]
            waiting = [link for _, link in self._retired]
        for link in over:
            link.close()
        for link in waiting:
            link.tend(now)

    def close(self) -> None:
        """Close all, for good."""
        with self._changing:
            self._closed = True
            links = [*self._live.values(), *(link for _, link in self._retired)]
            self._live.clear()
            self._retired.clear()
        for link in links:
            link.close()
