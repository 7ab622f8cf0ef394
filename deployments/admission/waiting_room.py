"""The gateway's side of admission: one waiting client per ticket, whoever decides.

The decisions are `routing.requests.admission.Admission`'s, in this process (`LocalAdmission`) or, for several
gateways, in one place for all (`client.RemoteAdmission`). The gate can change over between the two at any moment: it
knows every ticket and presents them to whoever decides next.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.config import AdmissionConfig
from routing.requests.admission import Admission, Admitted, Decision
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, Grant, ReplicaLoad, Tenant, Usage

TICK_S = 0.05
PROGRESS_INTERVAL_S = 0.2  # how often a running ticket tells how far it is


class Decider(Protocol):
    """Where decisions are made. They come back through the callback given at construction, at once or later."""

    def offer(self, ask: Ask) -> None: ...
    def adopt(self, ask: Ask, replica_id: str) -> None: ...
    def withdraw(self, ticket: str) -> None: ...
    def first_token(self, ticket: str) -> None: ...
    def progress(self, ticket: str, generated_tokens: int) -> None: ...
    def move(self, ticket: str) -> None: ...
    def finish(self, ticket: str, usage: Usage | None) -> None: ...
    def fleet(self, loads: Sequence[ReplicaLoad]) -> None: ...


class LocalAdmission:
    """Decides in this process. `share` below 1: one of several gateways that cannot ask the common place just now, and
    takes its part of the replicas and of each tenant's quota.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        clock: Callable[[], float],
        decided: Callable[[Decision], None],
        share: float = 1.0,
    ) -> None:
        self._admission = Admission(config, ReplicaChoice(), random.Random())
        self._clock = clock
        self._decided = decided
        self._share = share

    def offer(self, ask: Ask) -> None:
        self._say(self._admission.offer(self._part(ask), self._clock()))

    def adopt(self, ask: Ask, replica_id: str) -> None:
        self._admission.adopt(self._part(ask), replica_id, self._clock())

    def withdraw(self, ticket: str) -> None:
        self._say(self._admission.withdraw(ticket, self._clock()))

    def first_token(self, ticket: str) -> None:
        self._admission.first_token(ticket, self._clock())

    def progress(self, ticket: str, generated_tokens: int) -> None:
        self._admission.progress(ticket, generated_tokens, self._clock())

    def move(self, ticket: str) -> None:
        self._say(self._admission.move(ticket, self._clock()))

    def finish(self, ticket: str, usage: Usage | None) -> None:
        self._say(self._admission.finish(ticket, usage, self._clock()))

    def fleet(self, loads: Sequence[ReplicaLoad]) -> None:
        self._say(self._admission.fleet([_part_of_load(load, self._share) for load in loads], self._clock()))

    def tick(self) -> None:
        """To be called every TICK_S."""
        self._say(self._admission.tick(self._clock()))

    def _say(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            self._decided(decision)

    def _part(self, ask: Ask) -> Ask:
        return ask if self._share == 1 else replace(ask, tenant=_part_of_quota(ask.tenant, self._share))


def _part_of_load(load: ReplicaLoad, share: float) -> ReplicaLoad:
    slots, tokens = max(1, int(load.max_num_seqs * share)), int(load.kv_cache_tokens * share)
    return load if share == 1 else replace(load, max_num_seqs=slots, kv_cache_tokens=tokens)


def _part_of_quota(tenant: Tenant, share: float) -> Tenant:
    def part(limit: int | None) -> int | None:
        return None if limit is None else max(1, int(limit * share))

    return replace(
        tenant,
        requests_per_minute=part(tenant.requests_per_minute),
        tokens_per_minute=part(tenant.tokens_per_minute),
        max_streams=part(tenant.max_streams),
    )


@dataclass
class _Ticket:
    ask: Ask
    waiting: asyncio.Future[Grant] | None
    replica_id: str | None = None  # where it runs
    told_at: float = field(default=0.0)  # last progress


class Gate:
    """What the door calls. Every ticket that `admit` granted must be finished; one that it refused is gone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tickets: dict[str, _Ticket] = {}
        self._loads: Sequence[ReplicaLoad] = ()
        self._decider: Decider | None = None

    def decide_by(self, decider: Decider) -> None:
        """Change over: the new one learns what runs and what waits."""
        self._decider = decider
        decider.fleet(self._loads)
        for entry in self._tickets.values():
            if entry.replica_id is not None:
                decider.adopt(entry.ask, entry.replica_id)
        for entry in list(self._tickets.values()):
            if entry.waiting is not None:
                if entry.replica_id is not None:
                    decider.move(entry.ask.ticket)
                else:
                    decider.offer(entry.ask)

    def fleet(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas' newest loads."""
        self._loads = loads
        self._by().fleet(loads)

    async def admit(self, ask: Ask) -> Grant:
        """Wait for leave to run. Raises Refusal. Cancelling it withdraws the ticket."""
        entry = self._tickets[ask.ticket] = _Ticket(ask, None)
        return await self._wait(entry, lambda: self._by().offer(ask))

    async def move(self, ticket: str) -> Grant:
        """The ticket's replica was lost: leave to run elsewhere. Raises Refusal; the ticket is gone then."""
        entry = self._tickets[ticket]
        return await self._wait(entry, lambda: self._by().move(ticket))

    def first_token(self, ticket: str) -> None:
        """The ticket's first token came."""
        self._by().first_token(ticket)

    def progress(self, ticket: str, generated_tokens: int) -> None:
        """Tokens generated so far. Cheap: tells only every PROGRESS_INTERVAL_S."""
        entry, now = self._tickets[ticket], self._clock()
        if now - entry.told_at >= PROGRESS_INTERVAL_S:
            entry.told_at = now
            self._by().progress(ticket, generated_tokens)

    def finish(self, ticket: str, usage: Usage | None) -> None:
        """The ticket ended, well or not. Harmless for one that is gone."""
        if self._tickets.pop(ticket, None) is not None:
            self._by().finish(ticket, usage)

    def decided(self, decision: Decision) -> None:
        """Called by the decider. One about a ticket that nobody waits for any more has been overtaken."""
        ticket = decision.grant.ticket if isinstance(decision, Admitted) else decision.ticket
        entry = self._tickets.get(ticket)
        if entry is None or entry.waiting is None or entry.waiting.done():
            return
        if isinstance(decision, Admitted):
            entry.replica_id = decision.grant.replica_id
            entry.waiting.set_result(decision.grant)
        else:
            del self._tickets[ticket]
            entry.waiting.set_exception(decision.refusal)

    def open_tickets(self) -> int:
        """Waiting and running."""
        return len(self._tickets)

    async def _wait(self, entry: _Ticket, ask: Callable[[], None]) -> Grant:
        waiting = entry.waiting = asyncio.get_running_loop().create_future()
        try:
            ask()
            return await waiting
        except BaseException:
            # Cancelled, above all. The answer may have come in the same turn of the loop; a refused ticket is gone.
            if self._tickets.pop(entry.ask.ticket, None) is not None:
                if entry.replica_id is None:
                    self._by().withdraw(entry.ask.ticket)
                else:
                    self._by().finish(entry.ask.ticket, None)
            if waiting.done() and not waiting.cancelled():
                waiting.exception()  # a refusal that nobody reads any more
            raise
        finally:
            entry.waiting = None

    def _by(self) -> Decider:
        assert self._decider is not None, "decide_by comes first"
        return self._decider
