"""Who is alive and who holds what: the directory's decisions, as plain functions of events and a clock.

A cluster has a fixed number of slots; a slot is a share of the experts. A worker process takes a free slot, loads its
experts, and is in the placement table from the moment it announces itself ready until it leaves or falls silent. Every
change of the table is a new epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from monitoring.discovery import ScrapeTarget
from routing.tokens.placement import PlacementTable, WorkerEndpoint

State = Literal["loading", "ready"]


@dataclass(frozen=True)
class WorkerMember:
    """One expert worker process."""

    worker_id: str  # new with every process
    slot: int
    pid: int
    node: str
    address: str  # host:port; empty while loading
    state: State
    last_heartbeat_s: float  # clock of its last sign of life
    scrape: ScrapeTarget | None = None  # None: not told yet


class Membership:
    """Slots and their members. Not thread-safe; no I/O; the clock comes in with each event."""

    def __init__(
        self, slots: Sequence[Mapping[int, tuple[int, ...]]], heartbeat_timeout_s: float, now_s: float
    ) -> None:
        self._slots = slots
        self._timeout_s = heartbeat_timeout_s
        self._started_s = now_s
        self._members: dict[str, WorkerMember] = {}
        self._epoch = 0
        self._seen_epoch = 0  # newest epoch that a former directory published, by its workers' word
        self._published = False

    def join(self, worker_id: str, pid: int, node: str, now_s: float, slots: range | None = None) -> int | None:
        """Slot for a new worker, one of `slots` if they are given; None while each has a live member (ask again: a dead
        one falls silent).
        """
        self.expire(now_s)
        if worker_id in self._members:
            return self._members[worker_id].slot
        taken = {member.slot for member in self._members.values()}
        free = [slot for slot in slots or range(len(self._slots)) if slot not in taken]
        if not free:
            return None
        self._members[worker_id] = WorkerMember(worker_id, free[0], pid, node, "", "loading", now_s)
        return free[0]

    def register(self, member: WorkerMember, seen_epoch: int, now_s: float) -> bool:
        """A worker tells its state: `ready` once it holds its slot's experts and listens. Also how a new directory
        learns of old workers, whose `seen_epoch` (newest published epoch they know, 0 for none) keeps epochs growing.

        False if another worker has the slot, and then the caller must end itself; but one that is ready displaces one
        that only loads.
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
        return True

    def observe_epoch(self, epoch: int) -> None:
        """Somebody knows an epoch that a former directory published: ours go on from there."""
        if epoch > self._epoch:
            self._epoch = self._seen_epoch = epoch

    def heartbeat(self, worker_id: str, now_s: float) -> bool:
        """False if the worker is not known (any more): it must announce itself again."""
        self.expire(now_s)
        if worker_id not in self._members:
            return False
        self._members[worker_id] = replace(self._members[worker_id], last_heartbeat_s=now_s)
        return True

    def leave(self, worker_id: str) -> None:
        """A worker that ends in good order."""
        member = self._members.pop(worker_id, None)
        if member is not None and member.state == "ready":
            self._epoch += 1

    def expire(self, now_s: float) -> list[WorkerMember]:
        """Drop members that have been silent for too long; returns them."""
        silent = [m for m in self._members.values() if now_s - m.last_heartbeat_s > self._timeout_s]
        for member in silent:
            self.leave(member.worker_id)
        return silent

    def members(self) -> list[WorkerMember]:
        """All members, by slot."""
        return sorted(self._members.values(), key=lambda member: member.slot)

    def table(self, now_s: float) -> PlacementTable | None:
        """The current table. None until every expert has a holder for the first time; a directory that was restarted
        waits only as long as a live worker needs to be heard.
        """
        self.expire(now_s)
        ready = [member for member in self.members() if member.state == "ready"]
        if not self._published:
            recovered = self._seen_epoch > 0 and now_s - self._started_s > self._timeout_s
            self._published = not self._uncovered() or (bool(ready) and recovered)
        if not self._published:
            return None
        return PlacementTable(
            self._epoch, tuple(WorkerEndpoint(m.worker_id, m.address, self._slots[m.slot]) for m in ready)
        )

    def uncovered(self) -> int:
        """Experts, over all layers, that no ready worker holds."""
        return len(self._uncovered())

    def _uncovered(self) -> set[tuple[int, int]]:
        ready = [member for member in self._members.values() if member.state == "ready"]
        covered = {pair for member in ready for pair in _pairs(self._slots[member.slot])}
        return {pair for slot in self._slots for pair in _pairs(slot)} - covered


def _pairs(slot: Mapping[int, tuple[int, ...]]) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, experts in slot.items() for expert in experts}
