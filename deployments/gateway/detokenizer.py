"""The model's tokenizer in the gateway, loaded when it is first needed, and never on the event loop.

It counts prompts that may be too long, and decodes at the seam of a stream that goes on elsewhere.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tokenizers import Tokenizer

_PIECE_CHARS = 64 * 1024  # about 10 ms of counting


class ModelTokenizer:
    """Counts and decodes with the checkpoint's `tokenizer.json`. Raises OSError or whatever a broken file makes it."""

    def __init__(self, model: Path) -> None:
        self._file = model / "tokenizer.json"
        self._loading: asyncio.Task[Tokenizer] | None = None
        self._counting = asyncio.Semaphore(1)

    async def count(self, text: bytes, enough: int) -> int:
        """Tokens of a text, special ones that every prompt begins with included. Stops once there are more than
        `enough`: however long the text, this takes no longer than the longest prompt. One text at a time.
        """
        tokenizer = await self._tokenizer()
        async with self._counting:
            return await asyncio.to_thread(_count, tokenizer, text.decode("utf-8", "replace"), enough)

    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of some tokens."""
        tokenizer = await self._tokenizer()
        return str(await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=skip_special_tokens))

    async def _tokenizer(self) -> Tokenizer:
        if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
            self._loading = asyncio.create_task(asyncio.to_thread(Tokenizer.from_file, str(self._file)))
        return await asyncio.shield(self._loading)


def _count(tokenizer: Tokenizer, text: str, enough: int) -> int:
    tokens = 0
    for at in range(0, len(text), _PIECE_CHARS):
        tokens += len(tokenizer.encode(text[at : at + _PIECE_CHARS], add_special_tokens=at == 0).ids)
        if at:
            tokens -= 1  # a token that the cut went through was counted as two
        if tokens > enough:
            break
    return tokens
