"""What admission keeps of one attention replica: its own last word, and the requests that were sent there."""

from __future__ import annotations

from dataclasses import dataclass, field

from routing.requests.replica_choice import Candidate
from routing.requests.request import Priority, ReplicaLoad
from routing.requests.ticket import Ticket, TicketState


@dataclass(eq=False)
class ReplicaState:
    """Sums over its tickets are kept, not computed: they are read at every decision."""

    load: ReplicaLoad | None = None  # None: gone, or not yet heard of
    tickets: dict[str, Ticket] = field(default_factory=dict)
    sequences: int = 0
    queued_tokens: int = 0  # uncached prompt tokens of tickets without a first token
    kv_tokens: int = 0  # held or expected
    prefilled_tokens: int = 0  # counter
    sequence_s: float = 0.0  # integral of `sequences` over time
    at_s: float = 0.0  # of the integral
    by_class: list[int] = field(default_factory=lambda: [0] * len(Priority))  # tickets

    def candidate(self) -> Candidate:
        """For replica choice. Only for one that has a load."""
        assert self.load is not None
        return Candidate(self.load, self.sequences, self.queued_tokens, self.kv_tokens)

    def add(self, ticket: Ticket, replica_id: str, uncached_tokens: int, now_s: float) -> None:
        """The ticket is sent there."""
        self.pass_time(now_s)
        ticket.state, ticket.replica_id, ticket.placed_s = TicketState.PREFILLING, replica_id, now_s
        ticket.uncached_tokens = uncached_tokens
        ticket.ahead_tokens = self.queued_tokens + uncached_tokens
        self.tickets[ticket.ask.ticket] = ticket
        self.sequences += ticket.slots
        self.queued_tokens += uncached_tokens
        self.kv_tokens += ticket.kv_tokens
        self.by_class[ticket.ask.priority] += 1

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """It ended, or goes elsewhere."""
        self.pass_time(now_s)
        del self.tickets[ticket.ask.ticket]
        self.sequences -= ticket.slots
        if ticket.state is TicketState.PREFILLING:
            self.queued_tokens -= ticket.uncached_tokens
        self.kv_tokens -= ticket.kv_tokens
        self.by_class[ticket.ask.priority] -= 1
        ticket.state = TicketState.WAITING

    def first_token(self, ticket: Ticket, now_s: float) -> None:
        """Its prompt has been computed."""
        self.pass_time(now_s)
        ticket.state = TicketState.DECODING
        self.queued_tokens -= ticket.uncached_tokens
        self.prefilled_tokens += ticket.uncached_tokens
        self.mark(ticket, now_s)

    def mark(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's next progress is measured from here."""
        self.pass_time(now_s)
        ticket.mark_s, ticket.mark_tokens = now_s, ticket.generated_tokens
        ticket.mark_sequence_s, ticket.mark_prefilled = self.sequence_s, self.prefilled_tokens

    def holds(self, ticket: Ticket, kv_tokens: int) -> None:
        """The ticket's KV need is now thought to be this."""
        self.kv_tokens += kv_tokens - ticket.kv_tokens
        ticket.kv_tokens = kv_tokens

    def pass_time(self, now_s: float) -> None:
        """Before `sequences` changes."""
        self.sequence_s += self.sequences * max(0.0, now_s - self.at_s)
        self.at_s = now_s
