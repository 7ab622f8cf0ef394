"""The gateway's side of admission: one waiting request per ticket, whoever decides.

The decisions are `routing.requests.admission.Admission`'s, in this process (`local.LocalAdmission`) or, for several
gateways, in one place for all (`client.RemoteAdmission`). The waiting room can change over between the two at any
moment: it knows every ticket and presents them to whoever decides next.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from deployments.admission.messages import Cancel, Event, Finish, Move, Progress, Restore, Submit
from routing.requests.admission import Admitted, Decision
from routing.requests.request import Ask, Grant, ReplicaLoad, Usage

TICK_S = 0.05
PROGRESS_INTERVAL_S = 0.2  # how often a running ticket tells how far it is


class Decider(Protocol):
    """Where decisions are made. They come back through the callback given at construction, at once or later."""

    def tell(self, event: Event) -> None: ...
    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None: ...


class _State(Enum):
    """Where a request is."""

    WAITING = auto()  # for its first replica
    RUNNING = auto()
    MOVING = auto()  # its replica was lost, and it waits for another


@dataclass
class _Entry:
    """One request."""

    ask: Ask
    answer: asyncio.Future[Grant]  # to what it waits for, or waited for last
    came_s: float
    state: _State = _State.WAITING
    replica_id: str = ""  # where it runs, or ran last
    generated_tokens: int = 0
    told_at_s: float = -math.inf  # its last progress; minus infinity: none yet where it runs now


class WaitingRoom:
    """What the pipeline calls. Every ticket that `admit` granted must be finished; one that it refused is gone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._loads: Sequence[ReplicaLoad] = ()
        self._decider: Decider | None = None

    def decide_by(self, decider: Decider) -> None:
        """Change over: the new decider learns what runs and what waits."""
        self.leave()
        self._decider = decider
        decider.set_loads(self._loads)
        for entry in self._entries.values():
            if entry.state is not _State.WAITING:
                decider.tell(Restore(entry.ask, entry.replica_id, entry.generated_tokens))
        for entry in list(self._entries.values()):
            if entry.state is _State.WAITING:
                decider.tell(Submit(self._still(entry)))
            elif entry.state is _State.MOVING:
                decider.tell(Move(entry.ask.ticket))

    def _still(self, entry: _Entry) -> Ask:
        """The request as it is now: of its client's patience, what has been waited is gone."""
        if entry.ask.deadline_s is None:
            return entry.ask
        return replace(entry.ask, deadline_s=max(0.0, entry.ask.deadline_s - (self._clock() - entry.came_s)))

    def leave(self) -> None:
        """What waits holds nothing at the present decider any more; `decide_by` follows at once."""
        if self._decider is not None:
            for entry in list(self._entries.values()):
                if entry.state is _State.WAITING:
                    self._decider.tell(Cancel(entry.ask.ticket))

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas' newest loads."""
        self._loads = loads
        self._by().set_loads(loads)

    async def admit(self, ask: Ask) -> Grant:
        """Wait for leave to run. Raises Refusal. Cancelling it cancels the ticket."""
        entry = self._entries[ask.ticket] = _Entry(ask, asyncio.get_running_loop().create_future(), self._clock())
        return await self._answer(entry, Submit(ask))

    async def move(self, ticket: str) -> Grant:
        """The ticket's replica was lost: wait for leave to run elsewhere. Raises Refusal; the ticket is gone then.
        Cancelling it cancels the ticket, which is charged for what it has generated.
        """
        entry = self._entries[ticket]
        if entry.told_at_s > -math.inf:  # a replica that was lost before its first token has made no progress
            self._tell_progress(entry)
        entry.state, entry.answer = _State.MOVING, asyncio.get_running_loop().create_future()
        return await self._answer(entry, Move(ticket))

    def progress(self, ticket: str, generated_tokens: int) -> None:
        """Tokens generated so far. Cheap: the decider is told at once of a replica's first ones, then only every
        PROGRESS_INTERVAL_S.
        """
        entry = self._entries[ticket]
        entry.generated_tokens = generated_tokens
        if self._clock() - entry.told_at_s >= PROGRESS_INTERVAL_S:
            self._tell_progress(entry)

    def finish(self, ticket: str, usage: Usage) -> None:
        """The ticket ended and cost this. Harmless for one that is gone."""
        if self._entries.pop(ticket, None) is not None:
            self._by().tell(Finish(ticket, usage))

    def decided(self, decision: Decision) -> None:
        """Called by the decider. One about a ticket that nobody waits for any more has been overtaken."""
        ticket = decision.grant.ticket if isinstance(decision, Admitted) else decision.ticket
        entry = self._entries.get(ticket)
        if entry is None or entry.answer.done():
            return
        if isinstance(decision, Admitted):
            entry.state, entry.replica_id, entry.told_at_s = _State.RUNNING, decision.grant.replica_id, -math.inf
            entry.answer.set_result(decision.grant)
        else:
            del self._entries[ticket]
            entry.answer.set_exception(decision.refusal)

    def open_tickets(self) -> int:
        """Waiting and running."""
        return len(self._entries)

    async def _answer(self, entry: _Entry, event: Event) -> Grant:
        """The answer to the event."""
        try:
            self._by().tell(event)
            return await entry.answer
        except BaseException:
            # Cancelled, above all. The answer may have come in the same turn of the loop; a refused ticket is gone.
            if self._entries.pop(entry.ask.ticket, None) is not None:
                self._by().tell(Cancel(entry.ask.ticket))
            if entry.answer.done() and not entry.answer.cancelled():
                entry.answer.exception()  # a refusal that nobody reads any more
            raise

    def _tell_progress(self, entry: _Entry) -> None:
        entry.told_at_s = self._clock()
        self._by().tell(Progress(entry.ask.ticket, entry.generated_tokens))

    def _by(self) -> Decider:
        assert self._decider is not None, "decide_by comes first"
        return self._decider
