"""How the pairs of a turn are handed to a GPU: sorted by expert, cut into tiles, in one buffer that is copied at once.

Legend: T tokens, P pairs of token and expert, N held experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deployments.experts.kernels import Pairs

TILE_WORDS = 4  # expert, first pair in the order of experts, end, and one that keeps tiles aligned
_ALIGNED = 4  # words: the GPU's kernels are compiled for addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class Sections:
    """Where each part is in the buffer, in words of 4 bytes."""

    row_P: slice  # of hidden_TH, in the order of experts
    place_P: slice  # of each pair in that order; pairs in the order of tokens
    weight_P: slice  # float32, in the order of tokens
    first_T: slice  # each token's first pair in the order of tokens; one more: the end
    tiles: slice  # of TILE_WORDS each
    end: int


def words_for(rows: int, pairs: int, held: int, tile_rows: int) -> int:
    """Return the words that suffice for so many rows, pairs and held experts, with tiles of `tile_rows` or more."""
    tiles = min(pairs, pairs // tile_rows + held)
    return sum(map(_aligned, (pairs, pairs, pairs, rows + 1, tiles * TILE_WORDS)))


def lay_out(words: np.ndarray, pairs: Pairs, tokens: int, counts_N: np.ndarray, tile_rows: int) -> Sections:
    """Write the pairs of `tokens` tokens to `words` (int32). `counts_N`: pairs of each held expert."""
    number = len(pairs.local_P)
    sizes = (number, number, number, tokens + 1)
    starts = np.cumsum([0, *map(_aligned, sizes)])
    row_P, place_P, weight_P, first_T = (slice(at, at + size) for at, size in zip(starts[:-1], sizes, strict=True))
    order_P = np.argsort(pairs.local_P, kind="stable")
    words[row_P] = pairs.tokens_P[order_P]
    words[place_P][order_P] = np.arange(number, dtype=np.int32)
    words[weight_P].view(np.float32)[:] = pairs.scale_P
    words[first_T] = np.searchsorted(pairs.tokens_P, np.arange(tokens + 1))
    tiles = _tiles(counts_N, tile_rows)
    at = slice(int(starts[-1]), int(starts[-1]) + tiles.size)
    words[at] = tiles.ravel()
    return Sections(row_P, place_P, weight_P, first_T, at, at.stop)


def _tiles(counts_N: np.ndarray, tile_rows: int) -> np.ndarray:
    """Return int32 [number, 4], in the order of experts: the tiles of one expert read its weights at the same time."""
    tiles_N = -(-counts_N // tile_rows)
    expert = np.repeat(np.arange(len(counts_N)), tiles_N)
    within = np.arange(len(expert)) - np.repeat(np.cumsum(tiles_N) - tiles_N, tiles_N)
    ends_N = np.cumsum(counts_N)
    first = (ends_N - counts_N)[expert] + within * tile_rows
    end = np.minimum(first + tile_rows, ends_N[expert])
    return np.stack([expert, first, end, np.zeros_like(expert)], axis=1).astype(np.int32)


def _aligned(words: int) -> int:
    return -(-words // _ALIGNED) * _ALIGNED
