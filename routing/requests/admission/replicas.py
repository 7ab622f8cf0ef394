"""The attention replicas, what runs on each, and which of them a request may go to now.

A request needs its decode slots and its KV cache on one replica. While one waits that fits nowhere, those behind it
may go where they fit, but one replica is reserved for it: it takes only those that are expected to end before it has
drained, or that are before the waiting one in order and come soon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import ClassObjective
from routing.requests.prediction.pace import Pace
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.replica_state import ReplicaState
from routing.requests.request import Priority, ReplicaLoad
from routing.requests.ticket import Ticket

_AVOIDS_S = 1.0  # after so long, a moved request goes back to a replica that lost it rather than nowhere
_OPEN_S = 1.0  # for so long a reserved replica still takes those that are before its holder in order
_SURELY = 2.0  # a request "ends before" a time if twice its expected stay does


@dataclass(frozen=True)
class Reservation:
    """One replica drains for one waiting request."""

    ticket: Ticket
    state: ReplicaState
    since_s: float
    ready_s: float  # when the replica will probably have room for it


class Replicas:
    """See the module. Also knows the limit of each: the sequences at which steps take what is promised."""

    def __init__(self, choice: ReplicaChoice, pace: Pace, objectives: Mapping[Priority, ClassObjective]) -> None:
        self.choice = choice
        self.live: list[ReplicaState] = []
        self.most_slots = 1  # decode slots of the largest replica, as last seen
        self.reservation: Reservation | None = None
        self._pace = pace
        self._objectives = objectives
        self._states: dict[str, ReplicaState] = {}
        self._free: dict[tuple[Priority, bool], tuple[float, float]] = {}  # see `_most_free`; dropped with each change

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas, each with its newest load. Tickets at others stay there until they are moved."""
        live = []
        for load in loads:
            state = self._states.get(load.replica_id)
            if state is None:
                state = self._states[load.replica_id] = ReplicaState(load)
            if not state.live or state.load is not load:
                same = state.live and _room_of(state.load) == _room_of(load)
                state.load, state.live = load, True
                if not same:
                    self._set_limits(state)
                    self._free.clear()
            live.append(state)
        if live != self.live:
            gone = [state for state in self.live if state not in live]
            self.live = live
            for state in gone:
                state.live = False
                self.choice.forget(state.load.replica_id)
                self._drop_if_unused(state)
            if self.reservation is not None and not self.reservation.state.live:
                self.reservation = None
            self._free.clear()
        self.most_slots = max((load.max_num_seqs for load in loads), default=self.most_slots)

    def refresh_limits(self) -> None:
        """By what was learned of the pace since."""
        for state in self.live:
            self._set_limits(state)
        self._free.clear()

    def attention_limits(self, priority: Priority) -> list[float]:
        """Sequences that each live replica runs at the step time that a class is promised, as if experts had no queue:
        where they have, more attention replicas would not help.
        """
        most = self._pace.most_running(self._pace.bearable_step_s(self._objectives[priority].tpot_s), 0.0)
        return [min(state.load.max_num_seqs, most) for state in self.live]

    def running_at(self, ticket: Ticket) -> ReplicaState:
        """The replica that has the ticket."""
        return self._states[ticket.replica_id]

    def states(self) -> Sequence[ReplicaState]:
        """All that are live or have tickets."""
        return list(self._states.values())

    def add(self, ticket: Ticket, replica_id: str, uncached_tokens: int, now_s: float) -> ReplicaState:
        """The ticket is sent to a replica, which need not have been heard of yet."""
        state = self._states.get(replica_id)
        if state is None:
            state = self._states[replica_id] = ReplicaState(ReplicaLoad(replica_id, 1, 0))
        state.add(ticket, uncached_tokens, now_s)
        self._free.clear()
        return state

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's replica has it no longer."""
        state = self._states[ticket.replica_id]
        state.remove(ticket, now_s)
        self._free.clear()
        self._drop_if_unused(state)

    def open_to(self, ticket: Ticket, now_s: float) -> list[ReplicaState]:
        """Live replicas that it may go to: another one than those that lost it, if it need not wait long for one. That
        one of them still answers shows that it only blinked.
        """
        if not ticket.avoid:
            return self.live
        others = [state for state in self.live if state.load.replica_id not in ticket.avoid]
        return others if others or now_s - ticket.waits_since_s < _AVOIDS_S else self.live

    def any_free(self) -> bool:
        """Whether any replica has a free slot for any class. Cheap."""
        return any(self._most_free(priority, None)[0] >= 1 for priority in Priority)

    def pick(self, ticket: Ticket, now_s: float) -> str | None:
        """The replica to send the ticket to now; None if it has to wait. Cheap if all replicas are full."""
        held = self.reservation
        if held is not None and held.ticket is ticket:
            held = None
        slots, kv_tokens = self._most_free(ticket.ask.priority, held)
        if ticket.slots <= slots and ticket.kv_tokens <= kv_tokens:
            fitting = [state for state in self.open_to(ticket, now_s) if self._takes(state, ticket, held)]
            if held is not None and fitting:  # into the smallest gap: the larger ones are for those that wait
                fullest = max(state.sequences for state in fitting)
                fitting = [state for state in fitting if state.sequences == fullest]
            if fitting:
                return self.choice.best(ticket.ask, fitting)
        if held is None or not held.state.fits(ticket) or held.state not in self.open_to(ticket, now_s):
            return None
        return held.state.load.replica_id if self._may_use(held, ticket, now_s) else None

    def reserve(self, ticket: Ticket, now_s: float) -> None:
        """The ticket waits and others will pass it: keep the replica for it that will have room first."""
        ready_s, state = min(
            ((self.drained_in_s(state, ticket), state) for state in self.open_to(ticket, now_s)), key=lambda one: one[0]
        )
        self.reservation = Reservation(ticket, state, now_s, now_s + ready_s)
        self._free.clear()

    def release(self, ticket: Ticket) -> None:
        """The ticket waits no longer."""
        if self.reservation is not None and self.reservation.ticket is ticket:
            self.reservation = None
            self._free.clear()

    def drained_in_s(self, state: ReplicaState, ticket: Ticket) -> float:
        """Seconds until the replica has room for the ticket, if nothing else goes there. Its requests are taken to end
        independently, each after the mean of what they have left.
        """
        count = len(state.tickets)
        if not state.sequences or state.fits(ticket):
            return 0.0
        missing_slots = ticket.slots - (state.limit(ticket.ask.priority) - state.sequences)
        missing_kv = ticket.kv_tokens - (state.load.kv_cache_tokens - state.kv_tokens)
        ends = max(missing_slots * count / state.sequences, missing_kv * count / max(1, state.kv_tokens))
        ends = min(count, math.ceil(ends))
        step_s = self._pace.step_s(state.sequences, state.load.experts_queue_s)
        mean_s = max(1.0, state.left_tokens / state.sequences) * step_s
        return mean_s * math.log((count + 0.5) / (count - ends + 0.5))

    def _may_use(self, held: Reservation, ticket: Ticket, now_s: float) -> bool:
        holder = held.ticket
        if ticket.ask.priority < holder.ask.priority:
            return True
        same_class = ticket.ask.priority == holder.ask.priority
        if same_class and ticket.place < holder.place and now_s - held.since_s < _OPEN_S:
            return True
        step_s = self._pace.step_s(held.state.sequences + ticket.slots, held.state.load.experts_queue_s)
        prefill_s = self._pace.prefill_s(ticket.prompt_tokens, held.state.load.experts_queue_s)
        stay_s = prefill_s + ticket.left_tokens / max(1, ticket.ask.sequences) * step_s
        return now_s + _SURELY * stay_s <= held.ready_s

    @staticmethod
    def _takes(state: ReplicaState, ticket: Ticket, held: Reservation | None) -> bool:
        """Whether a replica that is not reserved takes the ticket; also by the limit of a higher class that waits."""
        if held is None:
            return state.fits(ticket)
        return state is not held.state and state.fits(ticket, held.ticket.ask.priority)

    def _most_free(self, priority: Priority, held: Reservation | None) -> tuple[float, float]:
        """The most slots and the most KV tokens that one replica has free for a class, the reserved one left out."""
        most = self._free.get((priority, held is None))
        if most is None:
            slots = kv_tokens = -math.inf
            apart, also = (None, priority) if held is None else (held.state, held.ticket.ask.priority)
            for state in self.live:
                if state is apart:
                    continue
                if not state.sequences:
                    slots = kv_tokens = math.inf
                elif (free := min(state.limit(priority), state.limit(also)) - state.sequences) >= 1:
                    slots = max(slots, free)
                    kv_tokens = max(kv_tokens, state.load.kv_cache_tokens - state.kv_tokens)
            most = self._free[priority, held is None] = slots, kv_tokens
        return most

    def _set_limits(self, state: ReplicaState) -> None:
        queue_s, most = state.load.experts_queue_s, state.load.max_num_seqs
        state.limits = tuple(
            min(most, self._pace.most_running(self._pace.bearable_step_s(one.tpot_s), queue_s))
            for one in self._objectives.values()
        )

    def _drop_if_unused(self, state: ReplicaState) -> None:
        if not state.live and not state.tickets:
            self._states.pop(state.load.replica_id, None)


def _room_of(load: ReplicaLoad) -> tuple[int, int, float]:
    """What room is computed from; the rest of what a replica says changes all the time."""
    return load.max_num_seqs, load.kv_cache_tokens, load.experts_queue_s
