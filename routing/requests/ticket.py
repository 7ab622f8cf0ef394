"""What admission keeps of one request, from its offer to its end."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import Reason
from routing.requests.request import Ask


@dataclass(eq=False, slots=True)
class Ticket:
    """Waits while `replica_id` is None, runs otherwise."""

    ask: Ask
    number: int  # in order of arrival
    waits_since_s: float  # when it came, or was last moved
    budget_s: float  # most seconds from `waits_since_s` to the first token
    end_probability: float  # per generated token
    cost: float  # what its tenant is charged in fair queuing: prompt and expected new tokens
    predicted_ttft_s: float = 0.0  # as of its offer
    would_refuse: Reason | None = None
    tag: float = 0.0  # its place in its class: virtual start time
    moved: bool = False
    avoid: frozenset[str] = frozenset()  # replicas that lost it

    # Since it runs:
    replica_id: str | None = None
    placed_s: float = 0.0
    uncached_tokens: int = 0  # of its prompt, that the replica had to compute
    ahead_tokens: int = 0  # prompt tokens before it at its replica, and its own, when it was placed
    kv_tokens: int = 0  # that it holds or will
    first_token_s: float | None = None
    generated_tokens: int = 0  # over all sequences
    earlier_tokens: int = 0  # of those, generated before it was moved: part of its prompt since
    # The last progress: when, and its replica's counters then.
    mark_s: float = 0.0
    mark_tokens: int = 0
    mark_sequence_s: float = 0.0
    mark_prefilled: int = 0

    @property
    def slots(self) -> int:
        """Decode slots that it takes."""
        return self.ask.sequences

    @property
    def prompt_tokens(self) -> int:
        """To be prefilled: after a move, with what was generated before."""
        return self.ask.prompt_tokens + self.earlier_tokens

    @property
    def tokens_left(self) -> float:
        """Most further tokens per sequence."""
        return max(0.0, (self.ask.max_new_tokens - self.generated_tokens) / self.ask.sequences)
