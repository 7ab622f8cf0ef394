"""Which expert workers are alive and what they are to hold: the directory's decisions, as functions of events, time.

The placement has slots (`routing.tokens.worker_slots`), each with a share: the experts, by layer, that the worker in it
is to hold. A worker process takes a free slot of its pool, loads the share, and is in the placement table from the
moment it registers as ready until it leaves or falls silent. While no ready worker has an expert in its share, because
its own was lost or is about to leave, others are wanted to hold it too. `routing.tokens.holdings` says what the table
lists and who may drop what.
Every change of the table has a new stamp.

Legend: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from monitoring.discovery import ScrapeTarget
from routing.tokens.holdings import Holdings
from routing.tokens.placement import NO_TABLE, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.share import Share
from routing.tokens.slot_shares import with_orphans
from routing.tokens.worker_slots import WorkerSlots

State = Literal["loading", "ready", "leaving"]


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
    held: Share = field(default_factory=dict)
    share: Share = field(default_factory=dict)  # of its slot, as it heard last; a new directory learns of it
    elastic: bool = False  # it can load and drop experts while it serves
    zone: str = ""  # its node's availability zone, where Ray has a label of it
    expert_bytes: int = 0  # of one expert as it holds it; 0 while loading
    free_bytes: int = 0  # of its host's memory
    speed: float = 0.0  # work per second of computing, lately (`ExpertCompute.work`); 0: not known yet
    pool: str = ""  # whose slot it has


class Membership:
    """Slots and the workers in them. No I/O and no clock: the time comes in with each event. Not thread-safe."""

    def __init__(
        self,
        shares: Sequence[Share],
        heartbeat_timeout_s: float,
        now_s: float,
        incarnation: int,
        on_lost: Callable[[WorkerMember], None] = lambda member: None,
        pools: Sequence[str] | None = None,
        fixed_pools: Collection[str] = (),
    ) -> None:
        """`shares` and `pools`: by slot; `fixed_pools`: whose workers cannot load and drop experts. `incarnation`: of
        the directory, unlike that of any other. `on_lost` is called with each worker that fell silent or ended,
        whichever event shows it.
        """
        layers = sorted({layer for share in shares for layer in share})
        experts = 1 + max((max(ids, default=-1) for share in shares for ids in share.values()), default=-1)
        self._holdings = Holdings(layers, experts)
        self._slots = WorkerSlots([self._holdings.mask(share) for share in shares], pools, fixed_pools)
        self._timeout_s = heartbeat_timeout_s
        self._started_s = now_s
        self._incarnation = incarnation
        self._on_lost = on_lost
        self._members: dict[str, WorkerMember] = {}
        self._has_predecessor = False  # an earlier directory published a table, as its workers and followers say
        self._published = False
        self._table: PlacementTable | None = None  # the last that somebody asked for

    # --- events ---

    def resize(self, slots: Mapping[str, int]) -> None:
        """Have so many slots in these pools from now on. A new one comes when a worker asks for it, and takes experts
        of the others; a slot too many goes once nobody is in it, and gives its experts to the others.
        """
        self._slots.resize(slots)
        self._give_up_empty_slots()
        self._want()

    def join(self, worker_id: str, pid: int, node: str, now_s: float, pool: str = "") -> int | None:
        """Give a new worker a free slot of its pool. Returns None while each has a live worker: ask again, because a
        dead one falls silent.
        """
        self.expire(now_s)
        if worker_id in self._members:
            return self._members[worker_id].slot
        live = self._live_slots()
        free = [slot for slot in self._slots.of(pool) if slot not in live]
        if free:
            slot = free[0]
        else:
            new = self._slots.add(pool, [member.slot for member in self._members.values()])
            if new is None:
                return None
            slot = new
            self._want()
        self._add(WorkerMember(worker_id, slot, pid, node, "", "loading", now_s, pool=pool))
        return slot

    def register(self, member: WorkerMember, seen: Stamp, now_s: float) -> bool:
        """Record what a worker says of itself: that it is `ready` once it holds its slot's share and listens, then
        whenever it holds something else. A new directory learns of old workers in this way, and from the newest stamp
        that they have `seen` that it has a predecessor.

        Returns False if another worker has the slot; the caller must then end itself. A ready worker displaces one that
        is still loading.
        """
        self.expire(now_s)
        self.observe(seen)
        before = self._members.get(member.worker_id)
        if before is None:
            rival = next((m for m in self._members.values() if m.slot == member.slot and m.state != "leaving"), None)
            if rival is not None and not (member.state == "ready" and rival.state == "loading"):
                return False
            if rival is not None:
                self._remove(rival.worker_id)
            if member.share:
                self._slots.learn(member.slot, member.pool, self._holdings.mask(member.share))
            self._add(replace(member, last_heartbeat_s=now_s))
        else:
            if before.state == "leaving":
                member = replace(member, state="leaving")
            if before.address != member.address and before.address:
                self._holdings.renumber(0)
            self._members[member.worker_id] = replace(
                member, last_heartbeat_s=now_s, busy=before.busy, speed=before.speed, free_bytes=before.free_bytes
            )
        if member.state != "loading":
            self._holdings.hold(member.worker_id, self._holdings.mask(member.held))
        self._give_up_empty_slots()
        self._want()
        self._publish(now_s)
        return True

    def observe(self, seen: Stamp) -> None:
        """Take note that somebody has seen a table with this stamp; NO_TABLE: none. Our numbers go on from there."""
        if seen.incarnation in (NO_TABLE.incarnation, self._incarnation):
            return
        self._has_predecessor = True
        if seen.n > self._holdings.tables:
            self._holdings.renumber(seen.n)

    def heartbeat(
        self, worker_id: str, busy: float, now_s: float, speed: float = 0.0, free_bytes: int = 0
    ) -> bool:
        """Record a sign of life. Returns False if the worker is not known (any more): it must register again."""
        self.expire(now_s)
        if worker_id not in self._members:
            return False
        self._members[worker_id] = replace(
            self._members[worker_id], last_heartbeat_s=now_s, busy=busy, speed=speed, free_bytes=free_bytes
        )
        return True

    def reshare(self, shares: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> None:
        """Change the shares of the slots of these workers (bool [L, E], by worker id), from now on and for their
        successors, and which part of an expert's rows each gets (float [L, E], in any unit).
        """
        slot_of = {worker_id: self._members[worker_id].slot for worker_id in {*shares, *weights}}
        self._slots.reshare(
            {slot_of[worker_id]: share_LE for worker_id, share_LE in shares.items()},
            {slot_of[worker_id]: weight_LE for worker_id, weight_LE in weights.items()},
        )
        self._holdings.renumber(0)
        self._want()

    def retire(self, worker_id: str, whatever_comes: bool = True) -> bool:
        """Have a worker's experts move to others, because it is about to leave. Returns whether it may: nobody needs it
        any more, or, if it leaves `whatever_comes`, nobody can take them. Ask again until it may.
        """
        member = self._members.get(worker_id)
        if member is None or member.state == "loading":
            return True
        self._members[worker_id] = replace(member, state="leaving")
        self._give_up_empty_slots()
        self._want()
        takers = any(other.state == "ready" and other.elastic for other in self._members.values())
        return (whatever_comes and not takers) or not self._holdings.keeps(worker_id).any()

    def leave(self, worker_id: str) -> None:
        """Remove a worker that ends in good order."""
        self._remove(worker_id)
        self._want()

    def lose(self, worker_id: str) -> None:
        """Remove a worker whose end was noticed."""
        member = self._members.get(worker_id)
        if member is not None:
            self.leave(worker_id)
            self._on_lost(member)

    def expire(self, now_s: float) -> None:
        """Lose the workers that have been silent for too long. To be called before a query."""
        for member in [m for m in self._members.values() if now_s - m.last_heartbeat_s > self._timeout_s]:
            self.lose(member.worker_id)
        self._publish(now_s)

    def followed(self, stamps: Iterable[Stamp]) -> None:
        """Record which tables the attention replicas use, NO_TABLE for one that has none yet. What only an earlier
        table lists may be dropped.
        """
        behind = [stamp for stamp in stamps if stamp != NO_TABLE]
        known = [stamp.n if stamp.incarnation == self._incarnation else 0 for stamp in behind]
        self._holdings.acknowledge(min(known, default=self._holdings.tables))

    def _publish(self, now_s: float) -> None:
        """The first table waits until every expert has a holder; that of a directory that was restarted, only as long
        as a live worker needs to send a heartbeat.
        """
        if self._published:
            return
        recovered = self._has_predecessor and now_s - self._started_s > self._timeout_s
        self._published = not self.uncovered() or (recovered and bool(self._ready()))
        if self._published:
            self._want()

    def _add(self, member: WorkerMember) -> None:
        self._members[member.worker_id] = member
        self._holdings.join(member.worker_id, self._slots.share(member.slot))

    def _remove(self, worker_id: str) -> None:
        if self._members.pop(worker_id, None) is not None:
            self._holdings.leave(worker_id)
            self._give_up_empty_slots()

    def _live_slots(self) -> set[int]:
        return {member.slot for member in self._members.values() if member.state != "leaving"}

    def _give_up_empty_slots(self) -> None:
        has = {member.slot: self._holdings.has(name) for name, member in self._members.items()}
        self._slots.give_up(self._live_slots(), has)

    def _want(self) -> None:
        """Decide what each worker is wanted to hold: its slot's share, and its part of the experts that are in no ready
        worker's share. Until the first table everybody is only starting.
        """
        nothing_LE = np.zeros_like(self._slots.needed_LE)
        wanted: dict[str, np.ndarray] = {
            member.worker_id: self._slots.share(member.slot) if member.state != "leaving" else nothing_LE
            for member in self.members()
        }
        ready = [member for member in self._ready() if member.state == "ready"]
        takers = [member.worker_id for member in ready if member.elastic]
        if self._published and takers:
            orphans_LE = self._slots.needed_LE.copy()
            for member in ready:
                orphans_LE &= ~wanted[member.worker_id]
            has = {taker: self._holdings.has(taker) for taker in takers}
            wanted |= with_orphans(orphans_LE, {taker: wanted[taker] for taker in takers}, has)
        for worker_id, wanted_LE in wanted.items():
            self._holdings.want(worker_id, wanted_LE)

    # --- queries ---

    def members(self) -> list[WorkerMember]:
        """All workers, by slot."""
        return sorted(self._members.values(), key=lambda member: member.slot)

    def knows(self, worker_id: str) -> bool:
        """Return whether a worker is one of them."""
        return worker_id in self._members

    def settled(self) -> bool:
        """Whether every slot has a ready worker, which can load and drop if its pool is not fixed, and all hold just
        what they are to hold.
        """
        if not (self._slots.complete() and len(self._members) == len(self._slots.shares_LE)):
            return False
        return all(
            member.state == "ready"
            and (member.elastic or self._slots.is_fixed(member.pool))
            and self._holdings.settled(member.worker_id)
            for member in self._members.values()
        )

    def shares(self) -> dict[str, np.ndarray]:
        """Return what the slot of each worker is to hold, bool [L, E] by worker id."""
        shares_LE = self._slots.shares_LE
        return {m.worker_id: shares_LE[m.slot] for m in self.members() if m.slot in shares_LE}

    def first_experts(self) -> dict[str, int]:
        """Return how many experts the slot of each worker was to hold at first, over all layers, by worker id."""
        first = self._slots.first_experts
        return {m.worker_id: first[m.slot] for m in self.members() if m.slot in first}

    def is_ready(self, worker_id: str) -> bool:
        """Return whether a worker is one of them and answers dispatches."""
        return self.knows(worker_id) and self._members[worker_id].state != "loading"

    def share(self, slot: int) -> Share:
        """Return what the worker in a slot is to hold, whatever else is the case."""
        return self._holdings.share(self._slots.share(slot))

    def share_of(self, worker_id: str) -> Share:
        """Return what the slot of a worker is to hold."""
        return self.share(self._members[worker_id].slot)

    def orders(self, worker_id: str) -> int:
        """Return a number, above 0, that changes with what `keeps` and `share_of` say of a worker, and costs little."""
        share_LE = self._slots.share(self._members[worker_id].slot)
        return 1 + zlib.crc32(self._holdings.keeps(worker_id).tobytes(), zlib.crc32(share_LE.tobytes()))

    def most_slots(self) -> int:
        """Return how many slots can have an expert of each layer."""
        return int(self._slots.needed_LE.sum(axis=1).min()) * self._slots.replicas

    def keeps(self, worker_id: str) -> Share:
        """Return what a worker is to hold now: it loads what it lacks and drops the rest."""
        return self._holdings.share(self._holdings.keeps(worker_id))

    def table(self) -> PlacementTable | None:
        """The placement table as of the last event; None before the first one is published."""
        if not self._published:
            return None
        stamp = Stamp(self._incarnation, self._holdings.tables)
        if self._table is None or self._table.stamp != stamp:
            listed = [(member, self._holdings.listed(member.worker_id)) for member in self._ready()]
            workers = [WorkerEndpoint(member.worker_id, member.address, share) for member, share in listed if share]
            layers, weights_LE = self._holdings.layers, self._slots.weights_LE
            weights = {
                member.worker_id: dict(zip(layers, weights_LE[member.slot], strict=True))
                for member in self._ready()
                if member.slot in weights_LE
            }
            self._table = PlacementTable.of(stamp, workers, weights)
        return self._table

    def uncovered(self) -> int:
        """Number of experts, over all layers, that no ready worker holds."""
        return int((self._slots.needed_LE & (self._holdings.holder_counts() == 0)).sum())

    def busy(self, pool: str) -> float | None:
        """How many workers of a pool would do what its ready ones do if they computed all the time; None: not known."""
        fractions = [member.busy for member in self._ready() if member.pool == pool and member.busy is not None]
        return sum(fractions) if fractions else None

    def _ready(self) -> list[WorkerMember]:
        return [member for member in self.members() if member.state != "loading"]
