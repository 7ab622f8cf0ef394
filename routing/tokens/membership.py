"""Which expert workers are alive and what they hold: the directory's decisions, as functions of events and time.

The placement has a fixed number of slots, numbered from 0. Each slot has a share: the experts, by layer, that the
worker in it holds. A worker process takes a free slot, loads the slot's share, and is in the placement table from the
moment it registers as ready until it leaves or falls silent. Every change of the table is a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from monitoring.discovery import ScrapeTarget
from routing.tokens.placement import PlacementTable, WorkerEndpoint

State = Literal["loading", "ready"]
Share = Mapping[int, tuple[int, ...]]  # layer -> expert ids


@dataclass(frozen=True)
class WorkerMember:
    """One expert worker process."""

    worker_id: str  # new with every process
    slot: int
    pid: int
    node: str
    address: str  # host:port; empty while loading
    state: State
    last_heartbeat_s: float = 0.0  # set by the directory, on its own clock
    scrape: ScrapeTarget | None = None  # None: not told yet
    busy: float | None = None  # fraction of its time that it computes; None before its first heartbeat
    cores: str = ""  # where its threads run, in words; empty where a GPU computes
    form: str = ""  # in which it holds and computes experts, in words; empty while loading


class Membership:
    """Slots and the workers in them. No I/O and no clock: the time comes in with each event. Not thread-safe."""

    def __init__(
        self,
        shares: Sequence[Share],
        heartbeat_timeout_s: float,
        now_s: float,
        on_lost: Callable[[WorkerMember], None] = lambda member: None,
    ) -> None:
        """`shares`: by slot. `on_lost` is called with each worker that fell silent, whichever event shows it."""
        self._shares = shares
        self._timeout_s = heartbeat_timeout_s
        self._started_s = now_s
        self._on_lost = on_lost
        self._members: dict[str, WorkerMember] = {}
        self._epoch = 0
        self._seen_epoch = 0  # newest epoch that an earlier directory published, as its workers say
        self._published = False

    # --- events ---

    def join(self, worker_id: str, pid: int, node: str, now_s: float, slots: range | None = None) -> int | None:
        """Give a new worker a free slot, one of `slots` if they are given. Returns None while each has a live worker:
        ask again, because a dead one falls silent.
        """
        self.expire(now_s)
        if worker_id in self._members:
            return self._members[worker_id].slot
        taken = {member.slot for member in self._members.values()}
        free = [slot for slot in slots or range(len(self._shares)) if slot not in taken]
        if not free:
            return None
        self._members[worker_id] = WorkerMember(worker_id, free[0], pid, node, "", "loading", now_s)
        return free[0]

    def register(self, member: WorkerMember, seen_epoch: int, now_s: float) -> bool:
        """Record a worker's state: `ready` once it holds its slot's share and listens. A new directory learns of old
        workers in this way; their `seen_epoch` (newest published epoch that they know, 0 for none) keeps epochs
        growing.

        Returns False if another worker has the slot; the caller must then end itself. A ready worker displaces one that
        is still loading.
        """
        self.expire(now_s)
        self.observe_epoch(seen_epoch)
        rival = next((m for m in self._members.values() if m.slot == member.slot), None)
        if rival is not None and rival.worker_id != member.worker_id:
            if not (member.state == "ready" and rival.state == "loading"):
                return False
            del self._members[rival.worker_id]
        self._members[member.worker_id] = replace(member, last_heartbeat_s=now_s)
        if member.state == "ready":
            self._epoch += 1
        self._publish(now_s)
        return True

    def observe_epoch(self, epoch: int) -> None:
        """Take note that somebody knows `epoch` from an earlier directory: ours go on from there."""
        if epoch > self._epoch:
            self._epoch = self._seen_epoch = epoch

    def heartbeat(self, worker_id: str, busy: float, now_s: float) -> bool:
        """Record a sign of life. Returns False if the worker is not known (any more): it must register again."""
        self.expire(now_s)
        if worker_id not in self._members:
            return False
        self._members[worker_id] = replace(self._members[worker_id], last_heartbeat_s=now_s, busy=busy)
        return True

    def leave(self, worker_id: str) -> None:
        """Remove a worker that ends in good order."""
        member = self._members.pop(worker_id, None)
        if member is not None and member.state == "ready":
            self._epoch += 1

    def expire(self, now_s: float) -> None:
        """Remove the workers that have been silent for too long. To be called before a query."""
        for member in [m for m in self._members.values() if now_s - m.last_heartbeat_s > self._timeout_s]:
            self.leave(member.worker_id)
            self._on_lost(member)
        self._publish(now_s)

    def _publish(self, now_s: float) -> None:
        """The first table waits until every expert has a holder; that of a directory that was restarted, only as long
        as a live worker needs to send a heartbeat.
        """
        recovered = self._seen_epoch > 0 and now_s - self._started_s > self._timeout_s
        if not self._published:
            self._published = not self._uncovered() or (recovered and bool(self._ready()))

    # --- queries ---

    def members(self) -> list[WorkerMember]:
        """All workers, by slot."""
        return sorted(self._members.values(), key=lambda member: member.slot)

    def table(self) -> PlacementTable | None:
        """The placement table as of the last event; None before the first one is published."""
        if not self._published:
            return None
        workers = (WorkerEndpoint(m.worker_id, m.address, self._shares[m.slot]) for m in self._ready())
        return PlacementTable(self._epoch, tuple(workers))

    def uncovered(self) -> int:
        """Number of experts, over all layers, that no ready worker holds."""
        return len(self._uncovered())

    def busy(self) -> float:
        """Mean fraction of their time that ready workers compute, 0 to 1."""
        fractions = [member.busy for member in self._ready() if member.busy is not None]
        return sum(fractions) / len(fractions) if fractions else 0.0

    def _ready(self) -> list[WorkerMember]:
        return [member for member in self.members() if member.state == "ready"]

    def _uncovered(self) -> set[tuple[int, int]]:
        covered = {pair for member in self._ready() for pair in _pairs(self._shares[member.slot])}
        return {pair for share in self._shares for pair in _pairs(share)} - covered


def _pairs(share: Share) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, experts in share.items() for expert in experts}
