"""What admission keeps of one attention replica: its own last word, and the requests that were sent there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from routing.requests.replica_choice import Candidate
from routing.requests.request import Priority
from routing.requests.ticket import Ticket, TicketState


@dataclass(eq=False)
class ReplicaState(Candidate):
    """One attention replica. Sums over its tickets are kept, not computed: they are read at every decision."""

    live: bool = False  # False: gone, or not yet heard of
    tickets: dict[str, Ticket] = field(default_factory=dict)
    left_tokens: float = 0.0  # that its tickets will probably still generate
    prefilled_tokens: int = 0  # counter
    sequence_s: float = 0.0  # integral of `sequences` over time
    at_s: float = 0.0  # of the integral
    by_class: list[int] = field(default_factory=lambda: [0] * len(Priority))  # sequences
    limits: tuple[float, ...] = (math.inf,) * len(Priority)  # sequences at which steps take what a class is promised

    def limit(self, priority: Priority) -> float:
        """With so many sequences, steps are as slow as the classes there, and this one, are promised."""
        found = self.limits[priority]
        for sequences, limit in zip(self.by_class, self.limits, strict=True):
            if sequences and limit < found:
                found = limit
        return found

    def fits(self, ticket: Ticket, also: Priority | None = None) -> bool:
        """Whether there is room for the ticket now, and steps would stay as fast as another class is promised."""
        limit = self.limit(ticket.ask.priority)
        if also is not None:
            limit = min(limit, self.limit(also))
        return self.has_room(ticket.slots, ticket.kv_tokens, limit)

    def add(self, ticket: Ticket, uncached_tokens: int, now_s: float) -> None:
        """The ticket is sent there."""
        self._pass_time(now_s)
        ticket.state, ticket.replica_id, ticket.placed_s = TicketState.PREFILLING, self.load.replica_id, now_s
        ticket.uncached_tokens = uncached_tokens
        ticket.ahead_tokens = self.queued_tokens + uncached_tokens
        self.tickets[ticket.ask.ticket] = ticket
        self.sequences += ticket.slots
        self.queued_tokens += uncached_tokens
        self.kv_tokens += ticket.kv_tokens
        self.left_tokens += ticket.left_tokens
        self.by_class[ticket.ask.priority] += ticket.slots

    def remove(self, ticket: Ticket, now_s: float) -> None:
        """The ticket ended, or goes elsewhere."""
        self._pass_time(now_s)
        del self.tickets[ticket.ask.ticket]
        self.sequences -= ticket.slots
        if ticket.state is TicketState.PREFILLING:
            self.queued_tokens -= ticket.uncached_tokens
        self.kv_tokens -= ticket.kv_tokens
        self.left_tokens -= ticket.left_tokens
        self.by_class[ticket.ask.priority] -= ticket.slots
        ticket.state = TicketState.WAITING

    def first_token(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's prompt has been computed."""
        ticket.state = TicketState.DECODING
        self.queued_tokens -= ticket.uncached_tokens
        self.prefilled_tokens += ticket.uncached_tokens
        self.mark(ticket, now_s)

    def mark(self, ticket: Ticket, now_s: float) -> None:
        """The ticket's next progress is measured from here."""
        self._pass_time(now_s)
        ticket.mark_s, ticket.mark_tokens = now_s, ticket.generated_tokens
        ticket.mark_sequence_s, ticket.mark_prefilled = self.sequence_s, self.prefilled_tokens

    def sequence_s_until(self, now_s: float) -> float:
        """`sequences` is integrated over time, until now."""
        return self.sequence_s + self.sequences * max(0.0, now_s - self.at_s)

    def expect(self, ticket: Ticket, kv_tokens: int, left_tokens: float) -> None:
        """So much KV cache is the ticket now thought to need in the end, and so many tokens to generate yet."""
        self.kv_tokens += kv_tokens - ticket.kv_tokens
        self.left_tokens += left_tokens - ticket.left_tokens
        ticket.kv_tokens, ticket.left_tokens = kv_tokens, left_tokens

    def _pass_time(self, now_s: float) -> None:
        """The integral is brought up to now, before `sequences` changes."""
        self.sequence_s, self.at_s = self.sequence_s_until(now_s), now_s
