"""Admission: which request runs where, which one waits, which one is refused, and why.

In this order: the tenant's quotas; room in the queue; prediction. What has to wait waits here and not in the engines,
so that the order is ours: strictly by class, and by start-time fair queuing between the tenants of a class; nobody
passes a request that waits before it. A request that would miss its deadline or its class's objective is refused when
it comes, and a waiting one as soon as that is seen.

No clock, no I/O: time comes with each call and never goes back; decisions are returned, also those about other tickets
than the one that a call is about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from cluster.config import AdmissionConfig, ClassObjective
from cluster.errors import NoCapacity, Overloaded, Plane, Reason, Refusal
from routing.requests.fair_queue import FairQueue
from routing.requests.prediction.decayed import Mean
from routing.requests.prediction.margin import Margin
from routing.requests.prediction.pace import Lengths, Pace, expected_tokens
from routing.requests.prediction.releases import Releases, Room, Stay
from routing.requests.quota import Quotas
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.replica_state import ReplicaState
from routing.requests.request import Ask, Grant, Priority, ReplicaLoad, Usage
from routing.requests.ticket import Ticket, TicketState

_RETRY_LEAST_S = 0.5
_RETRY_MOST_S = 60.0
_RETRY_NO_REPLICA_S = 5.0
_JITTER = 0.5  # Retry-After is up to this share longer than computed: those refused together do not come back together
_PACE_IS_KNOWN_S = 10.0  # after so long without a step, one request is let through to see how fast the cluster is now
_RELEASES_HOLD_S = 0.05  # for so long what was computed about running requests serves further offers
_AVOIDS_S = 1.0  # after so long, a moved request goes back to a replica that lost it rather than nowhere
_WAITING_SLACK = 1.1  # a waiting request is refused when its prediction exceeds its budget by this
R = TypeVar("R", bound=Refusal)
_NEXT = 0.05  # weight of one request in the picture of those that take what becomes free


@dataclass(frozen=True)
class Admitted:
    """Leave to run."""

    grant: Grant


@dataclass(frozen=True)
class Refused:
    """The ticket is gone."""

    ticket: str
    refusal: Refusal


Decision = Admitted | Refused


@dataclass(frozen=True)
class _Wait:
    """Until a request is placed."""

    seconds: float
    plane: Plane  # what it waits for


class Admission:
    """Decides for one set of attention replicas. Each ticket ends with a Refused, `cancel` or `finish`."""

    def __init__(self, config: AdmissionConfig, choice: ReplicaChoice, rng: random.Random) -> None:
        self._config = config
        self._choice = choice
        self._random = rng
        self._objectives: Mapping[Priority, ClassObjective] = {
            Priority.SYSTEM: config.system,
            Priority.INTERACTIVE: config.interactive,
            Priority.BATCH: config.batch,
        }
        self._quotas = Quotas()
        self._queues = {priority: FairQueue() for priority in Priority}
        self._tickets: dict[str, Ticket] = {}
        self._replicas: dict[str, ReplicaState] = {}
        self._empty_since_s: float | None = None  # since when none is live; None: one is, or nobody has asked yet
        self._most_seqs = 1  # decode slots of the largest replica, as last seen
        self._arrivals = 0
        self._lengths = Lengths()
        self._pace = Pace()
        self._margins = {priority: Margin() for priority in Priority}
        self._releases: tuple[float, Releases] | None = None
        # A typical request of those placed lately.
        self._next_bound, self._next_end = Mean(128.0, _NEXT), Mean(1 / 128, _NEXT)
        self._next_ahead, self._next_kv = Mean(0.0, _NEXT), Mean(256.0, _NEXT)

    # --- what the gateway tells ---

    def set_loads(self, loads: Sequence[ReplicaLoad], now_s: float) -> list[Decision]:
        """The live replicas, each with its newest load. Tickets at others stay there until they are moved."""
        live = {load.replica_id: load for load in loads}
        for replica_id, state in list(self._replicas.items()):
            if replica_id not in live:
                self._choice.forget(replica_id)
                state.load = None
                self._drop_if_unused(replica_id)
        for replica_id, load in live.items():
            self._replicas.setdefault(replica_id, ReplicaState()).load = load
        if live:
            self._empty_since_s = None
            self._most_seqs = max(load.max_num_seqs for load in loads)
        elif self._empty_since_s is None:
            self._empty_since_s = now_s
        return self._place_waiting(now_s)

    def submit(self, ask: Ask, now_s: float) -> list[Decision]:
        """A request came. It is decided at once or waits."""
        if not self._live():
            if self._empty_since_s is None:
                self._empty_since_s = now_s  # this admission is new and has not heard from the replicas yet
            if now_s - self._empty_since_s >= self._budget_s(ask):
                return [Refused(ask.ticket, self._no_capacity())]
        ask = replace(ask, sequences=_clamp(ask.sequences, 1, self._most_seqs))
        over = self._quotas.reserve(ask, now_s, self._mean_stay_s())
        if over is not None:
            return [Refused(ask.ticket, self._jittered(over))]
        ticket = self._new_ticket(ask, now_s)
        queue = self._queues[ask.priority]
        queue.asked(ask.tenant, ask.sequences, now_s)
        if self._config.mode == "off" and (replica_id := self._pick(ticket, now_s)) is not None:
            return [self._start(ticket, replica_id, now_s)]
        refusal, displaced = self._judge(ticket, now_s)
        if refusal is not None:
            if self._config.mode == "enforce":
                self._quotas.refund(ask, now_s)
                return [Refused(ask.ticket, refusal)]
            ticket.would_refuse = refusal.reason
        self._tickets[ask.ticket] = ticket
        queue.push(ticket)
        return displaced + self._place_waiting(now_s)

    def restore(self, ask: Ask, replica_id: str, now_s: float) -> None:
        """A request that another admission let run."""
        ticket = self._new_ticket(ask, now_s)
        self._quotas.restore(ask, now_s)
        self._tickets[ask.ticket] = ticket
        state = self._replicas.setdefault(replica_id, ReplicaState())
        state.add(ticket, replica_id, 0, now_s)
        state.first_token(ticket, now_s)
        ticket.moved = True  # its times say nothing about predictions made here

    def cancel(self, ticket_id: str, now_s: float) -> list[Decision]:
        """The client went away; if it ran, what is known of its tokens counts."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            return []
        if ticket.waits:
            self._end_waiting(ticket, now_s)
            return self._place_waiting(now_s)
        return self.finish(ticket_id, Usage(ticket.ask.prompt_tokens, ticket.generated_tokens, False), now_s)

    def first_token(self, ticket_id: str, now_s: float) -> None:
        """The first token came."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.state is not TicketState.PREFILLING:
            return
        state = self._replicas[ticket.replica_id]
        state.first_token(ticket, now_s)
        self._pace.observe_prefill(ticket.ahead_tokens, now_s - ticket.placed_s, _queue_s(state), now_s)
        if not ticket.moved and ticket.predicted_ttft_s is not None:
            margin = self._margins[ticket.ask.priority]
            margin.observe(ticket.predicted_ttft_s, now_s - ticket.waits_since_s, ticket.budget_s)

    def progress(self, ticket_id: str, generated_tokens: int, now_s: float) -> None:
        """So many tokens have been generated, over all sequences."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.waits:
            return
        state = self._replicas[ticket.replica_id]
        if ticket.state is TicketState.PREFILLING:
            self.first_token(ticket_id, now_s)
        ticket.generated_tokens = max(ticket.generated_tokens, generated_tokens)
        state.holds(ticket, ticket.prompt_tokens + self._new_kv_tokens(ticket))
        steps, took_s = (ticket.generated_tokens - ticket.mark_tokens) / ticket.slots, now_s - ticket.mark_s
        if steps <= 0 or took_s <= 0:
            return
        state.pass_time(now_s)
        running = (state.sequence_s - ticket.mark_sequence_s) / took_s
        prefilled = state.prefilled_tokens - ticket.mark_prefilled
        self._pace.observe_steps(steps, took_s, running, prefilled, _queue_s(state), now_s)
        state.mark(ticket, now_s)

    def move(self, ticket_id: str, now_s: float) -> list[Decision]:
        """Its replica was lost: it goes elsewhere, before all of its class. Its objective begins anew."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.waits:
            return []
        lost = ticket.replica_id
        self._replicas[lost].remove(ticket, now_s)
        self._drop_if_unused(lost)
        ticket.avoid |= {lost}
        ticket.waits_since_s, ticket.earlier_tokens = now_s, ticket.generated_tokens
        ticket.kv_tokens = ticket.prompt_tokens + self._new_kv_tokens(ticket)
        self._queues[ticket.ask.priority].push_front(ticket)
        return self._place_waiting(now_s)

    def finish(self, ticket_id: str, usage: Usage, now_s: float) -> list[Decision]:
        """It ended, or was cut off, and cost this."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            return []
        if ticket.waits:
            return self.cancel(ticket_id, now_s)
        replica_id, ask = ticket.replica_id, ticket.ask
        self._replicas[replica_id].remove(ticket, now_s)
        self._drop_if_unused(replica_id)
        del self._tickets[ticket_id]
        tokens = usage.prompt_tokens + usage.generated_tokens
        self._quotas.commit(ask, tokens, now_s)
        if usage.complete or usage.generated_tokens:
            self._lengths.observe(ask, usage.generated_tokens, usage.complete)
        self._queues[ask.priority].settle(ask.tenant, ticket.cost, tokens)
        return self._place_waiting(now_s)

    def tick(self, now_s: float) -> list[Decision]:
        """To be called often: refuses waiting requests that would miss."""
        self._pace.forget(now_s)
        decisions = self._place_waiting(now_s)
        for ticket, refusal in self._hopeless(now_s):
            if self._config.mode == "shadow" and self._live():
                ticket.would_refuse = ticket.would_refuse or refusal.reason
                continue
            self._end_waiting(ticket, now_s)
            if not ticket.moved and ticket.predicted_ttft_s is not None:
                self._margins[ticket.ask.priority].missed()
            decisions.append(Refused(ticket.ask.ticket, refusal))
        return decisions + self._place_waiting(now_s) if decisions else decisions

    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._queues.values())

    def running(self) -> int:
        """Requests that were sent to replicas and have not ended."""
        return len(self._tickets) - self.waiting()

    # --- placing ---

    def _place_waiting(self, now_s: float) -> list[Decision]:
        decisions: list[Decision] = []
        for queue in self._queues.values():
            if not len(queue):
                continue
            for ticket in queue:
                replica_id = self._pick(ticket, now_s)
                if replica_id is None:
                    if self._open_to(ticket, now_s):
                        return decisions
                    continue  # it waits for a replica that it was not lost by, and must not hold up the others
                queue.start(ticket)
                decisions.append(self._start(ticket, replica_id, now_s))
        return decisions

    def _pick(self, ticket: Ticket, now_s: float) -> str | None:
        open_to = self._open_to(ticket, now_s)
        if self._config.mode == "off":
            return self._choice.best(ticket.ask, [state.candidate() for state, _ in open_to])
        candidates = [
            state.candidate()
            for state, load in open_to
            if not state.sequences or state.sequences + ticket.slots <= self._limit(state, load, ticket.ask.priority)
        ]
        return self._choice.pick(ticket.ask, candidates, ticket.kv_tokens)

    def _open_to(self, ticket: Ticket, now_s: float) -> list[tuple[ReplicaState, ReplicaLoad]]:
        """Live replicas that it may go to: another one than those that lost it, if it need not wait long for one. That
        one of them still answers shows that it only blinked.
        """
        live = self._live()
        others = [(state, load) for state, load in live if load.replica_id not in ticket.avoid]
        return others if others or now_s - ticket.waits_since_s < _AVOIDS_S else live

    def _limit(self, state: ReplicaState, load: ReplicaLoad, priority: Priority) -> float:
        """Sequences at which steps are as slow as the classes there, and this one, are promised."""
        tpot_s = min(self._objectives[one].tpot_s for one in Priority if one == priority or state.by_class[one])
        return min(load.max_num_seqs, self._pace.most_running(tpot_s, _queue_s(state)))

    def _start(self, ticket: Ticket, replica_id: str, now_s: float) -> Admitted:
        ask, state = ticket.ask, self._replicas[replica_id]
        uncached = ticket.prompt_tokens - min(ticket.prompt_tokens, self._choice.cached_tokens(ask, replica_id))
        self._choice.placed(ask, replica_id)
        self._tickets[ask.ticket] = ticket
        state.add(ticket, replica_id, uncached, now_s)
        self._next_bound.add(ticket.tokens_left)
        self._next_end.add(ticket.end_probability)
        self._next_ahead.add(ticket.ahead_tokens)
        self._next_kv.add(ticket.kv_tokens / ticket.slots)
        limits = self._quotas.limits(ask.tenant, now_s)
        return Admitted(Grant(ask.ticket, replica_id, ticket.predicted_ttft_s, ticket.would_refuse, limits))

    def _new_ticket(self, ask: Ask, now_s: float) -> Ticket:
        self._arrivals += 1
        end_probability = self._lengths.end_probability(ask)
        new_tokens = ask.sequences * expected_tokens(end_probability, ask.max_new_tokens / ask.sequences)
        expected = ask.prompt_tokens + new_tokens
        return Ticket(
            ask, self._arrivals, now_s, self._budget_s(ask), end_probability, cost=max(1.0, expected),
            slots=ask.sequences, kv_tokens=math.ceil(expected),
        )  # fmt: skip

    def _budget_s(self, ask: Ask) -> float:
        """Most seconds to its first token."""
        objective_s = self._objectives[ask.priority].ttft_s
        return objective_s if ask.deadline_s is None else min(objective_s, ask.deadline_s)

    def _new_kv_tokens(self, ticket: Ticket) -> int:
        """KV tokens beside its prompt that it will hold when it ends."""
        since_placed = ticket.generated_tokens - ticket.earlier_tokens
        left = ticket.slots * expected_tokens(ticket.end_probability, ticket.tokens_left)
        return math.ceil(since_placed + left)

    def _end_waiting(self, ticket: Ticket, now_s: float) -> None:
        ask = ticket.ask
        self._queues[ask.priority].remove(ticket)
        del self._tickets[ask.ticket]
        if ticket.moved:  # it ran
            self._quotas.commit(ask, ask.prompt_tokens + ticket.generated_tokens, now_s)
        else:
            self._quotas.refund(ask, now_s)

    def _drop_if_unused(self, replica_id: str) -> None:
        state = self._replicas[replica_id]
        if state.load is None and not state.tickets:
            del self._replicas[replica_id]

    def _live(self) -> list[tuple[ReplicaState, ReplicaLoad]]:
        return [(state, state.load) for state in self._replicas.values() if state.load is not None]

    # --- judging ---

    def _judge(self, ticket: Ticket, now_s: float) -> tuple[Refusal | None, list[Decision]]:
        """Why the new ticket is refused, and whom it displaces if it is not. Sets its predicted TTFT, if there is one:
        while every replica is away for a moment, requests wait as long as they have time.
        """
        if not self._live():
            full = self.waiting() >= self._config.max_waiting
            return self._displace(ticket, _Wait(_RETRY_NO_REPLICA_S, Plane.ATTENTION), now_s) if full else (None, [])
        ask, margin = ticket.ask, self._margins[ticket.ask.priority]
        objective = self._objectives[ask.priority]
        step_s, plane = self._best_step(1)
        if step_s > objective.tpot_s and self._pace.unknown_for_s(now_s) < _PACE_IS_KNOWN_S:
            message = (
                f"a token takes {step_s:.2g} s now, and {ask.priority.label} requests are promised "
                f"{objective.tpot_s:g} s (admission.{ask.priority.label}.tpot_s)"
            )
            return self._overloaded(ask, message, self._mean_stay_s(), plane, Reason.TPOT, now_s), []
        wait = self._wait(ticket, now_s)
        predicted_s = wait.seconds + self._prefill_s(ticket, wait.seconds > 0)
        ticket.predicted_ttft_s = predicted_s if math.isfinite(predicted_s) else None
        safe_s = margin.applied(predicted_s)
        if safe_s > ticket.budget_s:
            plane = wait.plane if wait.seconds > 0.5 * predicted_s else plane
            return self._late(ticket, predicted_s, safe_s - ticket.budget_s, plane, now_s), []
        if wait.seconds > 0 and self.waiting() >= self._config.max_waiting:
            return self._displace(ticket, wait, now_s)
        return None, []

    def _wait(self, ticket: Ticket, now_s: float) -> _Wait:
        """Until a new ticket would be placed."""
        ask = ticket.ask
        queue = self._queues[ask.priority]
        tag = queue.next_tag(ask.tenant)
        slots, kv_tokens = queue.before(tag)
        for higher in self._higher(ask.priority):
            slots, kv_tokens = slots + higher.slots, kv_tokens + higher.kv_tokens
        for one in [queue, *self._higher(ask.priority)]:
            for moved in one.moved():
                if not self._open_to(moved, now_s):  # it holds up nobody
                    slots, kv_tokens = slots - moved.slots, kv_tokens - moved.kv_tokens
        if not slots and self._pick(ticket, now_s) is not None:
            return _Wait(0.0, Plane.ATTENTION)
        room = self._room(ask.priority, now_s)
        first = self._until_free(room, slots + ticket.slots, kv_tokens + ticket.kv_tokens)
        if not math.isfinite(first.seconds):
            return first
        overtakers = queue.overtakers(ask.tenant, tag, first.seconds, now_s)
        if overtakers < 0.5:
            return first
        per_slot = self._next_kv.value
        return self._until_free(
            room, slots + ticket.slots + overtakers, kv_tokens + ticket.kv_tokens + overtakers * per_slot
        )

    def _until_free(self, room: Room, slots: float, kv_tokens: float) -> _Wait:
        seconds, for_kv = room.until(slots, kv_tokens)
        return _Wait(seconds, Plane.KV_CACHE if for_kv else self._best_step(1)[1])

    def _room(self, priority: Priority, now_s: float) -> Room:
        free_slots = free_kv_tokens = 0.0
        for state, load in self._live():
            free_slots += max(0.0, self._limit(state, load, priority) - state.sequences)
            free_kv_tokens += max(0, load.kv_cache_tokens - state.kv_tokens)
        taken_per_s = sum(higher.demand_per_s(now_s) for higher in self._higher(priority))
        releases = self._releases_now(now_s)
        return Room(
            free_slots, free_kv_tokens, releases.slots(taken_per_s),
            releases.kv_tokens(taken_per_s * self._next_kv.value),
        )  # fmt: skip

    def _releases_now(self, now_s: float) -> Releases:
        if self._releases is None or now_s - self._releases[0] > _RELEASES_HOLD_S:
            self._releases = now_s, Releases([*self._stays(now_s)], self._next_stay())
        return self._releases[1]

    def _stays(self, now_s: float) -> Iterator[Stay]:
        for state in self._replicas.values():
            step_s = self._pace.step_s(state.sequences, _queue_s(state))
            for ticket in state.tickets.values():
                prefill_s = 0.0
                if ticket.state is TicketState.PREFILLING:
                    whole_s = self._pace.prefill_s(ticket.ahead_tokens, _queue_s(state))
                    prefill_s = max(0.0, whole_s - (now_s - ticket.placed_s))
                yield Stay(
                    ticket.slots, ticket.kv_tokens, prefill_s, ticket.tokens_left * step_s,
                    ticket.end_probability / step_s,
                )  # fmt: skip

    def _next_stay(self) -> Stay:
        live = self._live()
        sequences = sum(state.sequences for state, _ in live) / max(1, len(live))
        queue_s = sum(_queue_s(state) for state, _ in live) / max(1, len(live))
        step_s = self._pace.step_s(sequences, queue_s)
        prefill_s = self._pace.prefill_s(self._next_ahead.value, queue_s)
        return Stay(1, self._next_kv.value, prefill_s, self._next_bound.value * step_s, self._next_end.value / step_s)

    def _mean_stay_s(self) -> float:
        return self._next_stay().mean_s()

    def _prefill_s(self, ticket: Ticket, waits: bool) -> float:
        """From its placing to its first token, at the replica that would be fastest now."""
        tokens = []
        for state, load in self._live():
            uncached = ticket.prompt_tokens - self._choice.cached_tokens(ticket.ask, load.replica_id)
            tokens.append((uncached + (0 if waits else state.queued_tokens), _queue_s(state)))
        # One that waits is placed beside others: what stands before it then is what stood before others lately.
        return min(
            self._pace.prefill_s(max(ahead, self._next_ahead.value) if waits else ahead, queue_s)
            for ahead, queue_s in tokens
        )

    def _best_step(self, sequences: float) -> tuple[float, Plane]:
        """A token's time at the replica that is fastest with so many sequences, and which plane takes most of it."""
        queue_s = min(_queue_s(state) for state, _ in self._live())
        step_s = self._pace.step_s(sequences, queue_s)
        return step_s, Plane.EXPERTS if queue_s > 0.5 * step_s else Plane.ATTENTION

    def _displace(self, ticket: Ticket, wait: _Wait, now_s: float) -> tuple[Refusal | None, list[Decision]]:
        """The queue is full: the latest request of the most over-served tenant of the lowest class goes."""
        ask = ticket.ask
        tag = self._queues[ask.priority].next_tag(ask.tenant)
        for priority in reversed(Priority):
            victim = self._queues[priority].last()
            if victim is None or priority < ask.priority or (priority == ask.priority and victim.tag <= tag):
                continue
            if self._config.mode == "shadow":
                return None, []
            message = "a request of a higher class or of a tenant below its share took this one's place in the queue"
            refusal = self._overloaded(victim.ask, message, wait.seconds, wait.plane, Reason.DISPLACED, now_s)
            self._end_waiting(victim, now_s)
            return None, [Refused(victim.ask.ticket, refusal)]
        message = f"{self.waiting()} requests wait, the limit (admission.max_waiting)"
        return self._overloaded(ask, message, wait.seconds, wait.plane, Reason.QUEUE_FULL, now_s), []

    def _hopeless(self, now_s: float) -> list[tuple[Ticket, Refusal]]:
        """Waiting tickets that would miss, as things are."""
        found: list[tuple[Ticket, Refusal]] = []
        live = bool(self._live())
        slots = kv_tokens = 0.0
        for priority, queue in self._queues.items():
            if not len(queue):
                continue
            room = self._room(priority, now_s)  # once: there may be hundreds of tickets, 20 times a second
            for ticket in queue:
                waited_s = now_s - ticket.waits_since_s
                if not live or ticket.moved:
                    if waited_s > ticket.budget_s:
                        found.append((ticket, self._no_capacity()))
                    continue
                prefill_s = self._prefill_s(ticket, True)
                wait = self._until_free(room, slots + ticket.slots, kv_tokens + ticket.kv_tokens)
                predicted_s = waited_s + wait.seconds + prefill_s
                if waited_s + prefill_s > ticket.budget_s or predicted_s > _WAITING_SLACK * ticket.budget_s:
                    late = self._late(ticket, predicted_s, wait.seconds, wait.plane, now_s, Reason.WAITED)
                    found.append((ticket, late))
                    continue
                slots, kv_tokens = slots + ticket.slots, kv_tokens + ticket.kv_tokens
        return found

    def _higher(self, priority: Priority) -> list[FairQueue]:
        return [self._queues[one] for one in Priority if one < priority]

    # --- refusing ---

    def _late(
        self,
        ticket: Ticket,
        predicted_s: float,
        excess_s: float,
        plane: Plane,
        now_s: float,
        reason: Reason | None = None,
    ) -> Overloaded:
        ask = ticket.ask
        label, objective_s = ask.priority.label, self._objectives[ask.priority].ttft_s
        when = f"after about {predicted_s:.1f} s" if math.isfinite(predicted_s) else "too late: higher classes go first"
        promise = (
            f"{label} requests are promised it within {objective_s:g} s (admission.{label}.ttft_s)"
            if ticket.budget_s == objective_s
            else f"the client waits for {ticket.budget_s:g} s only"
        )
        reason = reason or (Reason.TTFT if ticket.budget_s == objective_s else Reason.DEADLINE)
        return self._overloaded(ask, f"the first token would come {when}; {promise}", excess_s, plane, reason, now_s)

    def _overloaded(
        self, ask: Ask, message: str, drained_in_s: float, plane: Plane, reason: Reason, now_s: float
    ) -> Overloaded:
        if not math.isfinite(drained_in_s):
            # Higher classes take it all now: until as much has run as waits.
            waiting = sum(queue.slots for queue in self._queues.values())
            drained_in_s = max(1.0, waiting) / max(1e-3, self._releases_now(now_s).slots_per_s) + self._mean_stay_s()
        refusal = Overloaded(
            f"overloaded ({plane}): {message}", retry_after_s=drained_in_s, plane=plane, reason=reason,
            limits=self._quotas.limits(ask.tenant, now_s),
        )  # fmt: skip
        return self._jittered(refusal)

    def _no_capacity(self) -> NoCapacity:
        return self._jittered(
            NoCapacity(
                "no attention replica is ready",
                retry_after_s=_RETRY_NO_REPLICA_S,
                plane=Plane.ATTENTION,
                reason=Reason.NO_REPLICA,
            )
        )

    def _jittered(self, refusal: R) -> R:
        if math.isfinite(refusal.retry_after_s):  # infinite: it can never be served as it is
            seconds = min(_RETRY_MOST_S, max(_RETRY_LEAST_S, refusal.retry_after_s))
            refusal.retry_after_s = seconds * (1 + _JITTER * self._random.random())
        return refusal


def _queue_s(state: ReplicaState) -> float:
    return state.load.experts_queue_s if state.load is not None else 0.0


def _clamp(value: int, least: int, most: int) -> int:
    return max(least, min(most, value))
