"""Decides which request runs where, which one waits, and which one is refused.

In this order: the tenant's quotas; room in the queue; prediction. What has to wait waits here and not in the engines,
so that the order is ours: strictly by class, and by start-time fair queuing between the tenants of a class. A request
that would miss its deadline or its class's objective is refused when it comes, and a waiting one as soon as that is
seen.

No clock, no I/O: time comes with each call and never goes back; decisions are returned, also those about other tickets
than the one that a call is about.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from cluster.config import AdmissionConfig
from cluster.errors import Reason, Refusal
from routing.requests.admission.decisions import Decision, Demand, Refused, Wait
from routing.requests.admission.forecast import Forecast
from routing.requests.admission.judging import Judge
from routing.requests.admission.placing import Placing
from routing.requests.admission.refusing import Refusals
from routing.requests.admission.replicas import Replicas
from routing.requests.admission.shared import Shared
from routing.requests.fair_queue import FairQueue
from routing.requests.prediction.decayed import Rate
from routing.requests.prediction.pace import Lengths, Pace
from routing.requests.quota import Quotas
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, Priority, ReplicaLoad, Usage
from routing.requests.ticket import Ticket, TicketState, expected_tokens

_LIMITS_HOLD_S = 0.05  # for so long, the replicas' limits follow no newly learned pace
_REFUSED_S = 30.0  # memory of what was refused, for `demand`


class Admission:
    """Decides for one set of attention replicas. Each ticket ends with a Refused, `cancel` or `finish`."""

    def __init__(self, config: AdmissionConfig, choice: ReplicaChoice, rng: random.Random, quotas: Quotas) -> None:
        """The accounts of `quotas` may outlive this admission."""
        self._config = config
        objectives = {priority: config.objective(priority.label) for priority in Priority}
        self._quotas = quotas
        self._queues = {priority: FairQueue() for priority in Priority}
        self._tickets: dict[str, Ticket] = {}
        self._empty_since_s: float | None = None  # since when none is live; None: one is, or nobody has asked yet
        self._arrivals = 0
        self._lengths = Lengths()
        self._pace = Pace()
        self._replicas = Replicas(choice, self._pace, objectives)
        self._limits_at_s = -math.inf
        shared = Shared(objectives, quotas, self._queues, self._replicas, self._pace, rng)
        self._forecast = Forecast(shared)
        self._refusals = Refusals(shared, self._forecast)
        self._judge = Judge(shared, self._forecast, self._refusals)
        self._placing = Placing(shared, self._forecast, config.mode == "off")
        self._refused = Rate(_REFUSED_S)  # sequences, for want of replicas

    # --- what the gateway tells ---

    def set_loads(self, loads: Sequence[ReplicaLoad], now_s: float) -> list[Decision]:
        """The live replicas, each with its newest load. Tickets at others stay there until they are moved."""
        self._replicas.set_loads(loads)
        if loads:
            self._empty_since_s = None
        elif self._empty_since_s is None:
            self._empty_since_s = now_s
        return self._placing.place_waiting(now_s)

    def submit(self, ask: Ask, now_s: float) -> list[Decision]:
        """A request came. It is decided at once or waits."""
        self._refresh_limits(now_s)
        ticket = self._new_ticket(ask, now_s)
        if not self._replicas.live:
            if self._empty_since_s is None:
                self._empty_since_s = now_s  # this admission is new and has not heard from the replicas yet
            if now_s - self._empty_since_s >= ticket.budget_s:
                return [self._refused_for_load(ticket, self._refusals.no_capacity(), now_s)]
        over = self._quotas.reserve(ask, now_s, self._forecast.mean_stay_s())
        if over is not None:
            return [Refused(ask.ticket, self._refusals.jittered(over))]
        if (self._config.mode == "off" or not ask.sequences) and (place := self._placing.anywhere(ticket, now_s)):
            self._tickets[ask.ticket] = ticket
            return [self._placing.start(ticket, place, now_s)]
        queue = self._queues[ask.priority]
        queue.note_demand(ask.tenant, ticket.slots, now_s)
        ticket.tag = queue.next_tag(ask.tenant)
        wait, ticket.predicted_ttft_s, refusal = self._judge.judge(ticket, now_s)
        displaced: list[Decision] = []
        if refusal is None and wait.seconds > 0 and self.waiting() >= self._config.max_waiting:
            refusal, displaced = self._displace(ticket, wait, now_s)
        if refusal is not None:
            if self._config.mode == "enforce":
                self._quotas.refund(ask, now_s)
                return [self._refused_for_load(ticket, refusal, now_s)]
            ticket.would_refuse = refusal.reason
        self._tickets[ask.ticket] = ticket
        queue.push(ticket)
        return displaced + self._placing.place_waiting(now_s)

    def restore(self, ask: Ask, replica_id: str, generated_tokens: int, now_s: float) -> None:
        """A request that another admission let run, and that has generated so much since. The quotas know of it."""
        ticket = self._new_ticket(ask, now_s)
        ticket.generated_tokens = generated_tokens
        ticket.left_tokens = ticket.expected_left_tokens()
        ticket.moved = ticket.restored = True  # its times say nothing about predictions made here
        self._tickets[ask.ticket] = ticket
        self._replicas.add(ticket, replica_id, 0, now_s).first_token(ticket, now_s)

    def cancel(self, ticket_id: str, now_s: float) -> list[Decision]:
        """The client went away; if it ran, what is known of its tokens counts."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            return []
        if ticket.waits:
            self._end_waiting(ticket, now_s)
            return self._placing.place_waiting(now_s)
        return self.finish(ticket_id, Usage(ticket.ask.prompt_tokens, ticket.generated_tokens, False), now_s)

    def progress(self, ticket_id: str, generated_tokens: int, now_s: float) -> None:
        """So many tokens have been generated, over all sequences. The first call says that the first token came."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.waits or not ticket.slots:
            return
        state = self._replicas.running_at(ticket)
        if ticket.state is TicketState.PREFILLING:
            state.first_token(ticket, now_s)
            self._pace.observe_prefill(ticket.ahead_tokens, now_s - ticket.placed_s, state.load.experts_queue_s, now_s)
            self._judge.first_token(ticket, now_s)
        ticket.generated_tokens = max(ticket.generated_tokens, generated_tokens)
        left_tokens = ticket.expected_left_tokens()
        state.expect(ticket, _kv_tokens(ticket, left_tokens), left_tokens)
        steps, took_s = (ticket.generated_tokens - ticket.mark_tokens) / ticket.slots, now_s - ticket.mark_s
        if steps <= 0 or took_s <= 0:
            return
        running = (state.sequence_s_until(now_s) - ticket.mark_sequence_s) / took_s
        prefilled = state.prefilled_tokens - ticket.mark_prefilled
        self._pace.observe_steps(steps, took_s, running, prefilled, state.load.experts_queue_s, now_s)
        state.mark(ticket, now_s)

    def move(self, ticket_id: str, now_s: float) -> list[Decision]:
        """Its replica was lost: it goes elsewhere, before all of its class. Its objective begins anew."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None or ticket.waits:
            return []
        self._replicas.remove(ticket, now_s)
        ticket.avoid |= {ticket.replica_id}
        ticket.waits_since_s = now_s
        if ticket.slots:
            ticket.earlier_tokens = ticket.generated_tokens
            ticket.least_uncached_tokens = ticket.prompt_tokens
            ticket.kv_tokens = _kv_tokens(ticket, ticket.left_tokens)
        self._queues[ticket.ask.priority].push_front(ticket)
        return self._placing.place_waiting(now_s)

    def finish(self, ticket_id: str, usage: Usage, now_s: float) -> list[Decision]:
        """It ended, or was cut off, and cost this."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            return []
        if ticket.waits:
            if ticket.moved:
                ticket.generated_tokens = max(ticket.generated_tokens, usage.generated_tokens)
            return self.cancel(ticket_id, now_s)
        if usage.prompt_tokens and not (ticket.ask.streamed or usage.complete or usage.generated_tokens):
            usage = replace(usage, generated_tokens=self._forecast.probably_generated(ticket, now_s))
        ask, tokens = ticket.ask, usage.prompt_tokens + usage.generated_tokens
        self._replicas.remove(ticket, now_s)
        del self._tickets[ticket_id]
        self._quotas.commit(ask, tokens, now_s)
        if usage.complete or usage.generated_tokens:
            self._lengths.observe(ask, usage.generated_tokens, usage.complete)
        if ticket.slots and not ticket.restored:
            self._queues[ask.priority].correct_cost(ask.tenant, ticket.cost, tokens)
        return self._placing.place_waiting(now_s)

    def tick(self, now_s: float) -> list[Decision]:
        """To be called often: refuses waiting requests that would miss."""
        self._pace.forget(now_s)
        self._refresh_limits(now_s)
        decisions = self._placing.place_waiting(now_s)
        refused = 0
        for ticket, refusal in self._judge.hopeless(now_s):
            if self._config.mode == "shadow" and self._replicas.live:
                ticket.would_refuse = ticket.would_refuse or refusal.reason
                continue
            self._end_waiting(ticket, now_s)
            self._judge.missed(ticket)
            decisions.append(self._refused_for_load(ticket, refusal, now_s))
            refused += 1
        return decisions + self._placing.place_waiting(now_s) if refused else decisions

    # --- what it reports ---

    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(queue) for queue in self._queues.values())

    def demand(self, now_s: float) -> Demand:
        """What clients ask for now. What was refused lately counts up to as much again as can run, so that one wave of
        repeated requests does not ask for any number of replicas.
        """
        limits = self._replicas.attention_limits(Priority.INTERACTIVE)
        slots = sum(ticket.slots for ticket in self._tickets.values())
        refused = min(sum(limits), self._refused.per_s(now_s) * self._forecast.mean_stay_s())
        return Demand(slots + refused, sum(limits) / max(1, len(limits)))

    # --- inside ---

    def _new_ticket(self, ask: Ask, now_s: float) -> Ticket:
        self._arrivals += 1
        end_probability = self._lengths.end_probability(ask)
        left_tokens, uncached = 0.0, 0
        if ask.sequences:
            left_tokens = ask.sequences * expected_tokens(end_probability, ask.max_new_tokens / ask.sequences)
            cached = self._replicas.choice.most_cached_tokens(ask, self._replicas.live)
            uncached = ask.prompt_tokens - min(ask.prompt_tokens, cached)
        expected = ask.prompt_tokens + left_tokens
        return Ticket(
            ask, self._arrivals, now_s, self._judge.budget_s(ask, uncached), end_probability, max(1.0, expected),
            slots=min(ask.sequences, self._replicas.most_slots), kv_tokens=math.ceil(expected) if ask.sequences else 0,
            left_tokens=left_tokens, least_uncached_tokens=uncached,
        )  # fmt: skip

    def _end_waiting(self, ticket: Ticket, now_s: float) -> None:
        ask = ticket.ask
        self._queues[ask.priority].remove(ticket)
        self._replicas.release(ticket)
        del self._tickets[ask.ticket]
        if ticket.moved:  # it ran
            self._quotas.commit(ask, ask.prompt_tokens + ticket.generated_tokens, now_s)
        else:
            self._quotas.refund(ask, now_s)

    def _displace(self, ticket: Ticket, wait: Wait, now_s: float) -> tuple[Refusal | None, list[Decision]]:
        """The queue is full: the latest request of the most over-served tenant of the lowest class goes."""
        ask = ticket.ask
        for priority in reversed(Priority):
            victim = self._queues[priority].last()
            if victim is None or priority < ask.priority or (priority == ask.priority and victim.tag <= ticket.tag):
                continue
            if self._config.mode == "shadow":
                return None, []
            message = "a request of a higher class or of a tenant below its share took this one's place in the queue"
            refusal = self._refusals.overloaded(victim.ask, message, wait.seconds, wait.plane, Reason.DISPLACED, now_s)
            self._end_waiting(victim, now_s)
            return None, [self._refused_for_load(victim, refusal, now_s)]
        message = f"{self.waiting()} requests wait, the limit (admission.max_waiting)"
        return self._refusals.overloaded(ask, message, wait.seconds, wait.plane, Reason.QUEUE_FULL, now_s), []

    def _refused_for_load(self, ticket: Ticket, refusal: Refusal, now_s: float) -> Refused:
        self._refused.add(ticket.slots, now_s)
        return Refused(ticket.ask.ticket, refusal)

    def _refresh_limits(self, now_s: float) -> None:
        if now_s - self._limits_at_s >= _LIMITS_HOLD_S:
            self._limits_at_s = now_s
            self._replicas.refresh_limits()


def _kv_tokens(ticket: Ticket, left_tokens: float) -> int:
    """KV tokens that it will hold when it ends."""
    return math.ceil(ticket.prompt_tokens + ticket.generated_tokens - ticket.earlier_tokens + left_tokens)
