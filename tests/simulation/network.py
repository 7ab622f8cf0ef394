"""A virtual network between attention processes and workers, and the link that the real client sends through.

Frames are late, lost, doubled and out of order; connections break a moment after a process died, and after the
keepalive when it is stopped or cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cluster.errors import DeepsplitError, WorkerLost, WorkerSilent
from routing.tokens.link import WorkerLink
from routing.tokens.wire import DispatchReply, ErrorReply, decode_reply, peek_frame_id
from tests.simulation.events import Timeline
from tests.simulation.worker import VirtualWorker

_KEEPALIVE_S = 3.0
_RESET_S = 0.01
_LOOK_S = 0.1


class Network:
    """Who can talk to whom, and how badly."""

    def __init__(self, line: Timeline, random: Random) -> None:
        self.line, self.random = line, random
        self.workers: dict[str, VirtualWorker] = {}  # by address
        self.lossy = 0.0  # probability that a frame is lost; half of it: doubled
        self.cut: set[tuple[str, str]] = set()  # (from, to), names of workers and clients: bytes vanish
        self.slow_s = 0.001

    def carry(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """Deliver something after a while, or not, or twice."""
        if (source, target) in self.cut or self.random.random() < self.lossy:
            return
        for _ in range(2 if self.random.random() < self.lossy / 2 else 1):
            delay_s = self.slow_s * self.random.expovariate(1.0)
            self.line.after(delay_s, lambda: None if (source, target) in self.cut else deliver())


class VirtualLink(WorkerLink):
    """A link of the client called `client`; the real one's interface, nothing of its inside."""

    def __init__(self, network: Network, client: str, address: str) -> None:
        self.address = address
        self._network, self._line, self._client = network, network.line, client
        self._worker = network.workers.get(address)
        self._open: set[int] = set()
        self._came: dict[int, DispatchReply | ErrorReply] = {}
        self._error: DeepsplitError | None = None
        self._closed = False
        self._unheard_s = 0.0  # how long the peer has not answered pings
        self._look()

    def send(self, frame: bytes) -> None:
        """Send a frame; the worker's answer comes back over the same connection, if it lives then."""
        self._open.add(peek_frame_id(frame))
        worker = self._worker
        if worker is None or self._error is not None:
            return

        def back(answer: bytes) -> None:
            self._network.carry(worker.name, self._client, lambda: self._take(answer))

        self._network.carry(self._client, worker.name, lambda: worker.do(lambda: worker.take(frame, back)))

    def receive(self, frame_id: int, timeout_s: float, give_up: bool = True) -> DispatchReply:
        """As the real one."""
        self._line.wait_for(lambda: frame_id in self._came or self._error is not None, max(0.0, timeout_s))
        reply = self._came.get(frame_id)
        if give_up or reply is not None:
            self.forget(frame_id)
        if reply is None:
            raise self._error or WorkerSilent(f"expert worker {self.address} did not answer in time")
        if isinstance(reply, ErrorReply):
            raise reply.error
        return reply

    def forget(self, frame_id: int) -> None:
        """As the real one."""
        self._open.discard(frame_id)
        self._came.pop(frame_id, None)

    @property
    def idle(self) -> bool:
        """As the real one."""
        return not self._open

    @property
    def broken(self) -> DeepsplitError | None:
        """As the real one."""
        return self._error

    def tend(self, now: float) -> None:
        """Nothing: pings are answered by `_look`."""

    def attend(self, seconds: float) -> bool:
        """Nothing: events carry all frames."""
        return False

    def close(self) -> None:
        """As the real one."""
        self._closed = True
        self._error = self._error or WorkerLost(f"expert worker {self.address}: the link was closed")

    def _take(self, answer: bytes) -> None:
        reply = decode_reply(answer)
        if not self._closed and self._error is None and reply.frame_id in self._open:
            self._open.discard(reply.frame_id)
            self._came[reply.frame_id] = reply

    def _look(self) -> None:
        """The keepalive."""
        if self._closed or self._error is not None:
            return
        worker, client = self._worker, self._client
        if worker is None or not worker.alive:
            self._line.after(_RESET_S, self._break)
            return
        cut = self._network.cut & {(client, worker.name), (worker.name, client)}
        self._unheard_s = self._unheard_s + _LOOK_S if cut or worker.stopped else 0.0
        if self._unheard_s >= _KEEPALIVE_S:
            self._break()
            return
        self._line.after(_LOOK_S, self._look)

    def _break(self) -> None:
        self._error = self._error or WorkerLost(f"expert worker {self.address}: UNAVAILABLE")
