"""The fake's language: a tokenizer of four bytes a token, and a next token that is a function of all before it.

So a stream that is continued elsewhere from the ids so far must go on with the very same tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from zlib import crc32

from benchmarks.fakes.service_model import BLOCK_TOKENS

VOCABULARY = 32_000
BYTES_PER_TOKEN = 4


def tokenize(text: bytes) -> list[int]:
    """Return the ids of a text; equal beginnings give equal ids."""
    padded = text + b" " * (-len(text) % BYTES_PER_TOKEN)
    return [chunk % VOCABULARY for chunk in array("I", padded)]


def word(token: int) -> str:
    """Return the text of one generated token."""
    return f" {token:x}"


class NextTokens:
    """The tokens that follow a prompt, each a function of all before it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._state = crc32(array("I", prompt).tobytes())

    def next(self) -> int:
        """Return the next token's id."""
        token = self._state % VOCABULARY
        self._state = crc32(array("I", (token,)).tobytes(), self._state)
        return token


def block_hashes(ids: Sequence[int]) -> list[int]:
    """Return one hash per full block, which covers all tokens before its end."""
    raw, state, hashes = array("I", ids), 0, []
    for end in range(BLOCK_TOKENS, len(raw) + 1, BLOCK_TOKENS):
        state = hash((state, raw[end - BLOCK_TOKENS : end].tobytes()))
        hashes.append(state)
    return hashes
