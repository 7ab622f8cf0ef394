"""What admission keeps of one request, from its submission to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

from cluster.errors import Reason
from routing.requests.request import Ask


class TicketState(Enum):
    """Where a request is."""

    WAITING = auto()  # in the queue of its class
    PREFILLING = auto()  # at a replica, before its first token
    DECODING = auto()  # at a replica, after its first token


@dataclass(eq=False, slots=True)
class Ticket:
    """One request. What it needs and is promised is known when it comes; the rest changes with its state."""

    ask: Ask
    number: int  # in order of arrival
    waits_since_s: float  # when it came, or was last moved
    budget_s: float  # most seconds from `waits_since_s` to the first token
    end_probability: float  # per generated token
    cost: float  # what its tenant is charged in fair queuing: prompt and expected new tokens
    slots: int  # decode slots that it takes: its sequences, or all that the largest replica has
    kv_tokens: int  # that it will hold in the end, prompt included
    left_tokens: float  # that it will probably generate yet, over all sequences
    least_uncached_tokens: int = 0  # of its prompt, at the replica that had most of it in its prefix cache
    state: TicketState = TicketState.WAITING
    predicted_ttft_s: float | None = None  # as of its submission; None: nothing finite was predicted
    would_refuse: Reason | None = None
    tag: float = 0.0  # its place in its class: virtual start time
    restored: bool = False  # another admission let it run: it was never in a queue here
    moved: bool = False  # it ran at a replica that was lost: its times teach nothing, and nobody displaces it
    avoid: frozenset[str] = frozenset()  # replicas that lost it

    # Once it was placed:
    replica_id: str = ""
    placed_s: float = 0.0
    uncached_tokens: int = 0  # of its prompt, that the replica had to compute
    ahead_tokens: int = 0  # prompt tokens before it at its replica, and its own, when it was placed
    generated_tokens: int = 0  # over all sequences
    earlier_tokens: int = 0  # of those, generated before it was moved: part of its prompt since
    # The last progress: when, and its replica's counters then.
    mark_s: float = 0.0
    mark_tokens: int = 0
    mark_sequence_s: float = 0.0
    mark_prefilled: int = 0

    @property
    def waits(self) -> bool:
        """Whether it is in a queue and not at a replica."""
        return self.state is TicketState.WAITING

    @property
    def place(self) -> tuple[float, int]:
        """Sorts the waiting tickets of a class."""
        return self.tag, self.number

    @property
    def prompt_tokens(self) -> int:
        """To be prefilled: after a move, with what was generated before."""
        return self.ask.prompt_tokens + self.earlier_tokens

    @property
    def most_left_tokens(self) -> float:
        """Most further tokens per sequence."""
        return max(0.0, (self.ask.max_new_tokens - self.generated_tokens) / max(1, self.ask.sequences))

    def expected_left_tokens(self) -> float:
        """Tokens that it will probably generate yet, over all sequences, by the lengths of earlier requests."""
        return self.ask.sequences * expected_tokens(self.end_probability, self.most_left_tokens)


def expected_tokens(end_probability: float, bound: float) -> float:
    """Mean length of a sequence that may have `bound` more tokens."""
    if bound <= 0:
        return 0.0
    return -math.expm1(-end_probability * bound) / end_probability
