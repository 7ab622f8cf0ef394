"""The fake's model folder: the tokenizer that a gateway decodes the fake's tokens with."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from benchmarks.fakes.tokens import VOCABULARY, word


def write_model(folder: Path) -> Path:
    """Write `tokenizer.json` into the folder, and return the folder."""
    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(VOCABULARY)}, unk_token=word(0)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
