"""The model's tokenizer in the gateway, loaded when it is first needed, and never on the event loop.

It counts prompts that may be too long, and decodes at the seam of a stream that goes on elsewhere.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tokenizers import Tokenizer


class ModelTokenizer:
    """Counts and decodes with the checkpoint's `tokenizer.json`. Raises OSError or whatever a broken file makes it."""

    def __init__(self, model: Path) -> None:
        self._file = model / "tokenizer.json"
        self._loading: asyncio.Task[Tokenizer] | None = None

    async def count(self, text: bytes) -> int:
        """Tokens of a text, special ones that every prompt begins with included."""
        tokenizer = await self._tokenizer()
        encoded = await asyncio.to_thread(tokenizer.encode, text.decode("utf-8", "replace"))
        return len(encoded.ids)

    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of some tokens."""
        tokenizer = await self._tokenizer()
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    async def _tokenizer(self) -> Tokenizer:
        if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
            self._loading = asyncio.create_task(asyncio.to_thread(Tokenizer.from_file, str(self._file)))
        return await asyncio.shield(self._loading)
