"""Which replica has probably seen which prompt prefix: the gateway's guess at the replicas' prefix caches.

A prompt is cut into blocks of bytes, because the gateway has no tokenizer on its hot path. Each block's hash covers
everything before it, so equal hashes mean equal prefixes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_BYTES = 256  # 64 to 80 tokens of English: four to five of vLLM's blocks
MAX_BLOCKS = 256  # of one prompt: 64 KiB of text; two prompts equal that far count as equal


def prefix_hashes(prompt: bytes) -> tuple[int, ...]:
    """One 64-bit hash per full block of the prompt, root first; the same in every process and on every machine.

    `prompt` is UTF-8 text, or token ids in any encoding in which equal prefixes are equal bytes.
    """
    chain = blake2b(digest_size=8)
    hashes = []
    for end in range(BLOCK_BYTES, min(len(prompt), BLOCK_BYTES * MAX_BLOCKS) + 1, BLOCK_BYTES):
        chain.update(prompt[end - BLOCK_BYTES : end])
        hashes.append(int.from_bytes(chain.copy().digest(), "little"))
    return tuple(hashes)


class PrefixIndex:
    """Per replica, the blocks that its prefix cache holds if it evicts the least recently used ones.

    A chain's root is always younger than its leaves, so the leaves go first (as in vLLM) and a block is never there
    without all before it: the longest known chain is found by bisection, not by walking.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def longest(self, replica_id: str, hashes: Sequence[int]) -> int:
        """How many of a prompt's leading blocks, of which there are some, the replica has seen."""
        known = self._blocks.get(replica_id)
        if not known or hashes[0] not in known:
            return 0
        return bisect_left(hashes, True, key=lambda block: block not in known)

    def add(self, replica_id: str, hashes: Sequence[int], capacity: int) -> None:
        """The replica gets a prompt with these blocks; of all its blocks the `capacity` youngest are kept."""
        known = self._blocks.setdefault(replica_id, OrderedDict())
        for block in reversed(hashes):
            known[block] = None
            known.move_to_end(block)
        while len(known) > capacity:
            known.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        self._blocks.pop(replica_id, None)
