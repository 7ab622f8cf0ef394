"""What a GPU is told of a turn's pairs: an independent walk over the buffer gives every pair back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.experts.kernels import Pairs
from deployments.experts.turn_layout import TILE_WORDS, lay_out, words_for

HELD = 5


@st.composite
def turns(draw: st.DrawFn) -> tuple[int, Pairs]:
    tokens = draw(st.integers(1, 40))
    asked = [draw(st.lists(st.integers(0, HELD - 1), max_size=3, unique=True)) for _ in range(tokens)]
    pairs = [(token, local) for token, locals_ in enumerate(asked) for local in locals_]
    weights = np.arange(len(pairs), dtype=np.float32) / 4
    of = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return tokens, Pairs(of[:, 0], of[:, 1], weights)


@given(turns(), st.sampled_from([1, 4, 16]))
def test_every_pair_is_in_one_tile_and_found_again(turn: tuple[int, Pairs], tile_rows: int) -> None:
    tokens, pairs = turn
    counts_N = np.bincount(pairs.local_P, minlength=HELD)
    words = np.full(words_for(tokens, len(pairs.local_P), HELD, tile_rows), -7, dtype=np.int32)
    at = lay_out(words, pairs, tokens, counts_N, tile_rows)
    tiles = words[at.tiles].reshape(-1, TILE_WORDS)
    expert_of: dict[int, int] = {}  # by place in the order of experts
    for expert, first, end, _ in tiles.tolist():
        assert 0 < end - first <= tile_rows
        assert expert_of.keys().isdisjoint(range(first, end))
        expert_of |= dict.fromkeys(range(first, end), expert)
    assert len(tiles) == sum(-(-count // tile_rows) for count in counts_N.tolist())
    row_P, place_P, first_T = words[at.row_P], words[at.place_P], words[at.first_T]
    for token in range(tokens):
        mine = range(int(first_T[token]), int(first_T[token + 1]))
        assert [pairs.tokens_P[pair] for pair in mine] == [token] * len(mine)
        for pair in mine:
            assert row_P[place_P[pair]] == token
            assert expert_of[int(place_P[pair])] == pairs.local_P[pair]
            assert words[at.weight_P].view(np.float32)[pair] == pairs.scale_P[pair]
    assert len(expert_of) == len(pairs.local_P)
    assert at.end <= len(words)
    for part in (at.row_P, at.place_P, at.weight_P, at.first_T, at.tiles):
        assert part.start % 4 == 0  # 16 bytes


@pytest.mark.parametrize("tile_rows", [1, 16, 128])
def test_one_expert_may_get_every_row(tile_rows: int) -> None:
    pairs = Pairs(np.arange(100), np.full(100, 3), np.ones(100, np.float32))
    words = np.zeros(words_for(100, 100, HELD, tile_rows), dtype=np.int32)
    at = lay_out(words, pairs, 100, np.bincount(pairs.local_P, minlength=HELD), tile_rows)
    tiles = words[at.tiles].reshape(-1, TILE_WORDS)
    assert set(tiles[:, 0]) == {3}
    assert tiles[-1, 2] == 100
