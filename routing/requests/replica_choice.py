"""Which of the attention replicas that have room for a request gets it.

The score is a cost in prefill tokens, so its terms add up: what the prompt still needs there after the prefix cache,
what is queued before it, and what a fuller replica costs in slower steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

from routing.requests.prefix_index import MAX_BLOCKS, PrefixIndex
from routing.requests.request import Ask, ReplicaLoad

# What a replica costs whose decode slots are all taken, and one whose KV cache is full, in prefill tokens. Chosen by
# `benchmarks.replica_choice --weights`: flat from 1,000 to 8,000 for slots, and everywhere for KV.
SLOTS_TOKENS = 4096.0
KV_TOKENS = 512.0
# A block of the index is taken for this many tokens of KV cache: 256 bytes at 4 bytes of English per token.
_TOKENS_PER_BLOCK = 64
_MOST_BLOCKS = 65536  # of one replica in the index: about 8 MB


@dataclass(eq=False)
class Candidate:
    """One live replica and what has been sent to it."""

    load: ReplicaLoad
    sequences: int = 0  # ours in flight there
    queued_tokens: int = 0  # prompt tokens sent there without a first token yet, less those cached when they were sent
    kv_tokens: int = 0  # that our requests there hold or reserve

    def has_room(self, slots: int, kv_tokens: int, most_sequences: float) -> bool:
        """Whether that many slots and KV tokens are free. An idle replica takes what no replica could otherwise: its
        engine bounds it, or refuses it with the reason.
        """
        if not self.sequences:
            return True
        return self.sequences + slots <= most_sequences and self.kv_tokens + kv_tokens <= self.load.kv_cache_tokens


class ReplicaChoice:
    """Remembers which prefixes went where; all else it is told at each choice."""

    def __init__(self, slots_tokens: float = SLOTS_TOKENS, kv_tokens: float = KV_TOKENS) -> None:
        self._slots_tokens = slots_tokens
        self._kv_tokens = kv_tokens
        self._index = PrefixIndex()

    def best(self, ask: Ask, candidates: Sequence[Candidate]) -> str | None:
        """The replica with the lowest cost, whether it has room or not; None of none."""
        if not candidates:
            return None
        # Equal costs fall out differently for each request and in no order of the replicas': nobody herds.
        best = min(candidates, key=lambda candidate: (self.cost(ask, candidate), tie_break_hash(ask, candidate.load)))
        return best.load.replica_id

    def cost(self, ask: Ask, candidate: Candidate) -> float:
        """Prefill tokens that `ask` would wait for at this replica, and what its load is worth in such tokens."""
        load = candidate.load
        uncached = ask.prompt_tokens - self.cached_tokens(ask, load.replica_id)
        sequences = max(candidate.sequences, load.running + load.waiting)
        kv_usage = max(candidate.kv_tokens / max(1, load.kv_cache_tokens), load.kv_cache_usage)
        return (
            uncached
            + candidate.queued_tokens
            + self._slots_tokens * sequences / load.max_num_seqs
            + self._kv_tokens * kv_usage
        )

    def cached_tokens(self, ask: Ask, replica_id: str) -> int:
        """Prompt tokens that the replica's prefix cache probably holds."""
        blocks = len(ask.prefix_hashes)
        if not blocks:
            return 0
        # The last, partial block has no hash; a prompt with more blocks than are hashed says nothing about their size.
        per_block = _TOKENS_PER_BLOCK if blocks == MAX_BLOCKS else ask.prompt_tokens / (blocks + 0.5)
        return min(ask.prompt_tokens, int(per_block * self._index.longest(replica_id, ask.prefix_hashes)))

    def most_cached_tokens(self, ask: Ask, candidates: Iterable[Candidate]) -> int:
        """Prompt tokens in the prefix cache of the replica that has most of them."""
        if not ask.prefix_hashes:
            return 0
        return max((self.cached_tokens(ask, candidate.load.replica_id) for candidate in candidates), default=0)

    def placed(self, ask: Ask, load: ReplicaLoad) -> None:
        """`ask` was sent to the replica with this load."""
        if ask.prefix_hashes:
            capacity = min(_MOST_BLOCKS, load.kv_cache_tokens // _TOKENS_PER_BLOCK)
            self._index.add(load.replica_id, ask.prefix_hashes, capacity)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._index.forget(replica_id)


def tie_break_hash(ask: Ask, load: ReplicaLoad) -> int:
    return crc32(f"{ask.ticket} {load.replica_id}".encode())
