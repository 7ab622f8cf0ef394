"""Which expert workers are alive and what they hold: the directory's decisions, as functions of events and time.

The placement has a fixed number of slots, numbered from 0. Each slot has a share: the experts, by layer, that the
worker in it holds. A worker process takes a free slot, loads the slot's share, and is in the placement table from the
moment it registers as ready until it leaves or falls silent. Every change of the table has a new stamp.

Legend: L MoE layers, E experts of a layer, P held pairs of layer and expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from monitoring.discovery import ScrapeTarget
from routing.tokens.placement import NO_TABLE, PlacementTable, Stamp, WorkerEndpoint

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
        incarnation: int,
        on_lost: Callable[[WorkerMember], None] = lambda member: None,
    ) -> None:
        """`shares`: by slot. `incarnation`: of the directory, unlike that of any other. `on_lost` is called with each
        worker that fell silent, whichever event shows it.
        """
        self._shares = shares
        self._timeout_s = heartbeat_timeout_s
        self._started_s = now_s
        self._on_lost = on_lost
        self._members: dict[str, WorkerMember] = {}
        self._stamp = Stamp(incarnation, 0)
        self._coverage = _Coverage(shares)
        self._has_predecessor = False  # an earlier directory published a table, as its workers and followers say
        self._published = False
        self._table: PlacementTable | None = None  # of the present stamp, once somebody asked

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

    def register(self, member: WorkerMember, seen: Stamp, now_s: float) -> bool:
        """Record a worker's state: `ready` once it holds its slot's share and listens. A new directory learns of old
        workers in this way, and from the newest stamp that they have `seen` that it has a predecessor.

        Returns False if another worker has the slot; the caller must then end itself. A ready worker displaces one that
        is still loading.
        """
        self.expire(now_s)
        self.observe(seen)
        rival = next((m for m in self._members.values() if m.slot == member.slot), None)
        if rival is not None and rival.worker_id != member.worker_id:
            if not (member.state == "ready" and rival.state == "loading"):
                return False
            self._remove(rival.worker_id)
        before = self._members.get(member.worker_id)
        if before is not None and (before.state, before.address) != (member.state, member.address):
            self._remove(member.worker_id)
            before = None
        self._members[member.worker_id] = replace(member, last_heartbeat_s=now_s)
        if member.state == "ready" and before is None:
            self._coverage.add(member.slot)
            self._changed()
        self._publish(now_s)
        return True

    def observe(self, seen: Stamp) -> None:
        """Take note that somebody has seen a table with this stamp; NO_TABLE: none."""
        self._has_predecessor |= seen.incarnation not in (NO_TABLE.incarnation, self._stamp.incarnation)

    def heartbeat(self, worker_id: str, busy: float, now_s: float) -> bool:
        """Record a sign of life. Returns False if the worker is not known (any more): it must register again."""
        self.expire(now_s)
        if worker_id not in self._members:
            return False
        self._members[worker_id] = replace(self._members[worker_id], last_heartbeat_s=now_s, busy=busy)
        return True

    def leave(self, worker_id: str) -> None:
        """Remove a worker that ends in good order."""
        self._remove(worker_id)

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
        recovered = self._has_predecessor and now_s - self._started_s > self._timeout_s
        if not self._published:
            self._published = not self._coverage.missing or (recovered and bool(self._ready()))

    def _remove(self, worker_id: str) -> None:
        member = self._members.pop(worker_id, None)
        if member is not None and member.state == "ready":
            self._coverage.remove(member.slot)
            self._changed()

    def _changed(self) -> None:
        self._stamp = Stamp(self._stamp.incarnation, self._stamp.n + 1)
        self._table = None

    # --- queries ---

    def members(self) -> list[WorkerMember]:
        """All workers, by slot."""
        return sorted(self._members.values(), key=lambda member: member.slot)

    def table(self) -> PlacementTable | None:
        """The placement table as of the last event; None before the first one is published."""
        if not self._published:
            return None
        if self._table is None:
            workers = [WorkerEndpoint(m.worker_id, m.address, self._shares[m.slot]) for m in self._ready()]
            self._table = PlacementTable.of(self._stamp, workers)
        return self._table

    def uncovered(self) -> int:
        """Number of experts, over all layers, that no ready worker holds."""
        return self._coverage.missing

    def busy(self) -> float:
        """Mean fraction of their time that ready workers compute, 0 to 1."""
        fractions = [member.busy for member in self._ready() if member.busy is not None]
        return sum(fractions) / len(fractions) if fractions else 0.0

    def _ready(self) -> list[WorkerMember]:
        return [member for member in self.members() if member.state == "ready"]


class _Coverage:
    """How many workers hold each expert, counted as they come and go."""

    def __init__(self, shares: Sequence[Share]) -> None:
        layers = sorted({layer for share in shares for layer in share})
        experts = 1 + max((max(ids, default=-1) for share in shares for ids in share.values()), default=-1)
        at = {layer: row * experts for row, layer in enumerate(layers)}
        self._pairs_P = [
            np.array([at[layer] + expert for layer, ids in share.items() for expert in ids], dtype=np.int64)
            for share in shares
        ]  # by slot, flat indices of [L, E]
        self._holders = np.zeros(len(layers) * experts, dtype=np.int32)
        self.missing = len(np.unique(np.concatenate(self._pairs_P)))  # experts of some share that nobody holds

    def add(self, slot: int) -> None:
        pairs_P = self._pairs_P[slot]
        self.missing -= int((self._holders[pairs_P] == 0).sum())
        self._holders[pairs_P] += 1

    def remove(self, slot: int) -> None:
        pairs_P = self._pairs_P[slot]
        self._holders[pairs_P] -= 1
        self.missing += int((self._holders[pairs_P] == 0).sum())
