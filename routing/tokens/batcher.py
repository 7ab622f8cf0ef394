"""Which rows a worker computes next. Pure: no threads, no clock of its own, no arithmetic.

Legend: T rows (tokens) of a request.

One turn computes one group: rows of the same layer, dtype and top-k, at most `max_rows` of them. Requests of up to an
eighth of that are *light* (decode steps), the others *heavy* (prefill). The order:

1. All light requests that came before the last heavy turn ended, by group, the group with the oldest one first.
2. One heavy turn: up to `max_rows` rows of the oldest heavy request, filled up with whatever waits for the same layer.
3. Again from 1.

So a light request waits for at most one heavy turn besides the light ones, whatever is queued, and a heavy one gets a
turn after each round of light ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.errors import WorkerBusy
from routing.tokens.wire import DispatchRequest

GroupKey = tuple[int, torch.dtype, int]  # layer, dtype of the rows, top-k

_LIGHT_SHARE = 8
_FULL = 0.5  # of a caller's patience: a queue that has waited for longer would probably answer too late


class Owner(Protocol):
    """Whom a reply goes to."""

    def answer(self, frame: bytes, request_bytes: int) -> None:
        """Send the reply to a request of that size."""


class QueuedRequest:
    """A request from its arrival to its reply."""

    __slots__ = ("arrived", "compute_s", "expires", "frame_bytes", "key", "output_TH", "owner", "request",
                 "rows", "started", "taken")  # fmt: skip

    def __init__(self, request: DispatchRequest, owner: Owner, frame_bytes: int, arrived: float) -> None:
        """`frame_bytes`: the request's size. `arrived`: seconds, on the clock of `Batcher.next`."""
        self.request = request
        self.owner = owner
        self.frame_bytes = frame_bytes
        self.rows, top_k = request.expert_ids_TK.shape
        self.key: GroupKey = (request.layer, request.hidden_TH.dtype, top_k)  # shared by what is computed together
        self.arrived = arrived
        self.expires = arrived + request.deadline_ms / 1000  # then its caller gives up
        self.started = 0.0  # when its first rows were computed
        self.taken = 0  # rows given to turns so far
        self.compute_s = 0.0
        self.output_TH: torch.Tensor | None = None  # of a request computed in slices; in the reply's dtype


@dataclass(slots=True)  # several per request: frozen ones take longer to make
class Slice:
    """Rows `first` to `last` (exclusive) of one request."""

    work: QueuedRequest
    first: int
    last: int

    @property
    def ends(self) -> bool:
        """Whether the request has no rows after these."""
        return self.last == self.work.rows


@dataclass(slots=True)
class Turn:
    """What to do next: compute `slices` together (none: nothing waits), and refuse `expired`."""

    slices: list[Slice] = field(default_factory=list)
    expired: list[QueuedRequest] = field(default_factory=list)
    rows: int = 0  # of the slices


class Batcher:
    """The queue. Not thread-safe."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._light_rows = max_rows // _LIGHT_SHARE
        self._light: dict[QueuedRequest, None] = {}  # both in order of arrival
        self._heavy: dict[QueuedRequest, None] = {}
        self._round_ends = 0.0  # light requests that came later are not of this round
        self._in_heavy_turn = False

    def __len__(self) -> int:
        """Requests that wait, those in part computed included."""
        return len(self._light) + len(self._heavy)

    def add(self, work: QueuedRequest) -> None:
        """Queue a request. Raises WorkerBusy if requests like it have waited too long for it to be answered in time."""
        light = work.rows <= self._light_rows
        queue = self._light if light else self._heavy
        if queue:
            queue_s = work.arrived - next(iter(queue)).arrived
            if queue_s > _FULL * (work.expires - work.arrived):
                raise WorkerBusy(f"requests have been waiting for {queue_s:.1f} s, too long for this one", queue_s)
        if not light and not self._heavy:
            self._round_ends = work.arrived  # light ones that came before go first
        queue[work] = None

    def drop(self, work: QueuedRequest) -> None:
        """Take a request out that failed; one that does not wait is left as it is."""
        self._light.pop(work, None)
        self._heavy.pop(work, None)

    def drop_untouched(self) -> list[QueuedRequest]:
        """Take out, and return, all requests of which nothing is being or was computed."""
        dropped = [work for work in (*self._light, *self._heavy) if work.taken == 0]
        for work in dropped:
            self.drop(work)
        return dropped

    def drop_owner(self, owner: Owner) -> None:
        """Take out all requests of one that went away."""
        for work in [*self._light, *self._heavy]:
            if work.owner is owner:
                self.drop(work)

    def next(self, now: float) -> Turn:
        """Return the next turn. Call it when the former one is done."""
        if self._in_heavy_turn:
            self._in_heavy_turn, self._round_ends = False, now
        turn = Turn()
        light = self._oldest(self._light, now, turn)
        heavy = self._oldest(self._heavy, now, turn)
        if light is not None and (heavy is None or light.arrived <= self._round_ends):
            self._fill(turn, light.key, self._light, now)
        elif heavy is not None:
            self._in_heavy_turn = True
            self._fill(turn, heavy.key, self._heavy, now)
            self._fill(turn, heavy.key, self._light, now)
        return turn

    def _oldest(self, queue: dict[QueuedRequest, None], now: float, turn: Turn) -> QueuedRequest | None:
        for work in list(queue):
            if now <= work.expires:
                return work
            del queue[work]
            turn.expired.append(work)
        return None

    def _fill(self, turn: Turn, key: GroupKey, queue: dict[QueuedRequest, None], now: float) -> None:
        for work in [work for work in queue if work.key == key]:
            room = self._max_rows - turn.rows
            if room <= 0:
                return
            if now > work.expires:
                del queue[work]
                turn.expired.append(work)
                continue
            first = work.taken
            work.taken = min(work.rows, first + room)
            if first == 0:
                work.started = now
            turn.slices.append(Slice(work, first, work.taken))
            turn.rows += work.taken - first
            if work.taken == work.rows:
                del queue[work]
