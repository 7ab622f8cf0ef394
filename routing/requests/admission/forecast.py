"""When a request would get its first token: how long it waits, and what its prefill takes."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cluster.errors import Plane
from routing.requests.admission.decisions import Wait
from routing.requests.admission.shared import Shared
from routing.requests.fair_queue import FairQueue
from routing.requests.prediction.decayed import Mean
from routing.requests.prediction.releases import Releases, Room, Stay
from routing.requests.replica_state import ReplicaState
from routing.requests.request import Priority
from routing.requests.ticket import Ticket, TicketState

_HOLD_S = 0.05  # for so long what was computed about running requests serves further predictions
_SAMPLE = 128  # running requests that are looked at one by one
_NEXT = 0.05  # weight of one request in the picture of those that take what becomes free
_NO_REPLICA_S = 5.0

_Floats = NDArray[np.floating]


class Forecast:
    """Predicts from what runs and waits, and from the pace and lengths seen lately."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._releases: tuple[float, Releases] | None = None
        # A typical request of those placed lately.
        self._next_bound, self._next_end = Mean(128.0, _NEXT), Mean(1 / 128, _NEXT)
        self._next_ahead, self._next_kv = Mean(0.0, _NEXT), Mean(256.0, _NEXT)

    def placed(self, ticket: Ticket) -> None:
        """It is one of those placed lately."""
        self._next_bound.add(ticket.most_left_tokens)
        self._next_end.add(ticket.end_probability)
        self._next_ahead.add(ticket.ahead_tokens)
        self._next_kv.add(ticket.kv_tokens / ticket.slots)

    def wait(self, ticket: Ticket, now_s: float) -> Wait:
        """Until a new ticket would be placed."""
        if not self._shared.replicas.live:
            return Wait(_NO_REPLICA_S, Plane.ATTENTION)
        if self._shared.replicas.pick(ticket, now_s) is not None:
            return Wait(0.0, Plane.ATTENTION)
        ask = ticket.ask
        queue, higher = self._shared.queues[ask.priority], self.higher(ask.priority)
        slots, kv_tokens, wide = self._ahead(ticket, queue, higher, now_s)
        room = self.room(ask.priority, now_s)
        first = self._until(room, slots + ticket.slots, kv_tokens + ticket.kv_tokens, wide)
        if math.isfinite(first.seconds):
            overtakers = queue.overtakers(ask.tenant, ticket.tag, first.seconds, now_s)
            if overtakers >= 0.5:
                kv_tokens_too = overtakers * self._next_kv.value
                first = self._until(
                    room, slots + ticket.slots + overtakers, kv_tokens + ticket.kv_tokens + kv_tokens_too, wide
                )
        if ticket.slots > 1:  # in one piece, on one replica
            replicas = self._shared.replicas
            drained_s = min(replicas.drained_in_s(state, ticket) for state in replicas.open_to(ticket, now_s))
            if drained_s > first.seconds:
                return Wait(drained_s, first.plane)
        return first

    def prefill_s(self, ticket: Ticket, waits: bool) -> float:
        """From its placing to its first token, at the replica that would be fastest now."""
        live, pace = self._shared.replicas.live, self._shared.pace
        if waits or not live:
            # It is placed beside others: what stands before it then is what stood before others lately.
            return pace.prefill_s(max(ticket.least_uncached_tokens, self._next_ahead.value), self.least_queue_s())
        choice, ask = self._shared.replicas.choice, ticket.ask
        return min(
            pace.prefill_s(
                ask.prompt_tokens - choice.cached_tokens(ask, state.load.replica_id) + state.queued_tokens,
                state.load.experts_queue_s,
            )
            for state in live
        )

    def prefills_s(self, uncached_tokens: _Floats) -> _Floats:
        """As `prefill_s`, for many that wait."""
        fixed_s, per_token_s = self._shared.pace.prefill_line()
        tokens = np.maximum(uncached_tokens, self._next_ahead.value)
        return self.least_queue_s() + np.maximum(1e-4, fixed_s + per_token_s * tokens)

    def room(self, priority: Priority, now_s: float) -> Room:
        """What is free for a class now and later, when higher classes take what they ask for."""
        free_slots = free_kv_tokens = 0.0
        for state in self._shared.replicas.live:
            free_slots += max(0.0, state.limit(priority) - state.sequences)
            free_kv_tokens += max(0, state.load.kv_cache_tokens - state.kv_tokens)
        taken_per_s = sum(queue.demand_per_s(now_s) for queue in self.higher(priority))
        releases = self.releases(now_s)
        return Room(
            free_slots, free_kv_tokens, releases.slots(taken_per_s),
            releases.kv_tokens(taken_per_s * self._next_kv.value),
        )  # fmt: skip

    def releases(self, now_s: float) -> Releases:
        """When what runs now will end."""
        if self._releases is None or now_s - self._releases[0] > _HOLD_S:
            states = self._shared.replicas.states()
            total = sum(len(state.tickets) for state in states)
            every = max(1, -(-total // _SAMPLE))
            stays, skip = [], 0
            for state in states:
                stays += [self._stay(state, one, now_s) for one in islice(state.tickets.values(), skip, None, every)]
                skip = (skip - len(state.tickets)) % every
            self._releases = now_s, Releases(stays, total / max(1, len(stays)), self._next_stay())
        return self._releases[1]

    def probably_generated(self, ticket: Ticket, now_s: float) -> int:
        """Tokens that a request which shows nothing before its end has generated by now, by how long it has run."""
        state = self._shared.replicas.running_at(ticket)
        queue_s = state.load.experts_queue_s
        decoding_s = now_s - ticket.placed_s - self._shared.pace.prefill_s(ticket.ahead_tokens, queue_s)
        steps = max(0.0, decoding_s) / self._shared.pace.step_s(state.sequences, queue_s)
        return min(ticket.ask.max_new_tokens, int(steps * ticket.slots))

    def mean_stay_s(self) -> float:
        """How long a typical request holds its slots."""
        return self._next_stay().mean_s()

    def best_step(self) -> tuple[float, Plane]:
        """A single sequence's seconds per token where experts answer fastest, and which plane takes most of it."""
        queue_s = self.least_queue_s()
        step_s = self._shared.pace.step_s(1, queue_s)
        return step_s, Plane.EXPERTS if queue_s > 0.5 * step_s else Plane.ATTENTION

    def least_queue_s(self) -> float:
        """The shortest queue at the experts that a replica reports."""
        return min((state.load.experts_queue_s for state in self._shared.replicas.live), default=0.0)

    def higher(self, priority: Priority) -> list[FairQueue]:
        """The queues of all higher classes."""
        return [self._shared.queues[one] for one in Priority if one < priority]

    def part_beside_wide(self) -> float:
        """The part of the replicas that takes narrow requests while one is reserved for a wide one."""
        live = len(self._shared.replicas.live)
        return (live - 1) / live if live > 1 else 1.0

    def _until(self, room: Room, slots: float, kv_tokens: float, passes_wide: bool) -> Wait:
        seconds, for_kv = room.until(np.array([slots]), np.array([kv_tokens]))
        plane = Plane.KV_CACHE if for_kv[0] else self.best_step()[1]
        return Wait(float(seconds[0]) / (self.part_beside_wide() if passes_wide else 1.0), plane)

    def _ahead(self, ticket: Ticket, queue: FairQueue, higher: list[FairQueue], now_s: float) -> tuple[int, int, bool]:
        """Slots and KV tokens of those placed before the ticket, and whether it passes wide ones."""
        wide = any(one.wide for one in (queue, *higher))
        passes = wide and ticket.slots == 1 and len(self._shared.replicas.live) > 1
        most_slots = 1 if passes else math.inf
        slots, kv_tokens = queue.before(ticket.tag, most_slots)
        for one in higher:
            more = one.before(math.inf, most_slots)
            slots, kv_tokens = slots + more[0], kv_tokens + more[1]
        for one in (queue, *higher):
            for moved in one.moved():
                if moved.slots <= most_slots and not self._shared.replicas.open_to(moved, now_s):  # it holds up nobody
                    slots, kv_tokens = slots - moved.slots, kv_tokens - moved.kv_tokens
        return slots, kv_tokens, passes

    def _stay(self, state: ReplicaState, ticket: Ticket, now_s: float) -> Stay:
        queue_s = state.load.experts_queue_s
        step_s = self._shared.pace.step_s(state.sequences, queue_s)
        prefill_s = 0.0
        if ticket.state is TicketState.PREFILLING:
            prefill_s = max(0.0, self._shared.pace.prefill_s(ticket.ahead_tokens, queue_s) - (now_s - ticket.placed_s))
        return Stay(
            ticket.slots, ticket.kv_tokens, prefill_s, ticket.most_left_tokens * step_s,
            ticket.end_probability / step_s,
        )  # fmt: skip

    def _next_stay(self) -> Stay:
        live = self._shared.replicas.live
        sequences = sum(state.sequences for state in live) / max(1, len(live))
        queue_s = sum(state.load.experts_queue_s for state in live) / max(1, len(live))
        step_s = self._shared.pace.step_s(sequences, queue_s)
        prefill_s = self._shared.pace.prefill_s(self._next_ahead.value, queue_s)
        return Stay(1, self._next_kv.value, prefill_s, self._next_bound.value * step_s, self._next_end.value / step_s)
