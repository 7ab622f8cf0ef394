"""Counts of the router's choice, their bytes and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from routing.tokens.routed_tokens import RoutedTokens, RoutedTokensCounter, RoutedTokensFile


def ids(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.int16)


def test_every_choice_counts_once_and_no_expert_does_not() -> None:
    counter = RoutedTokensCounter(4)
    for layer in (5, 5, 3):
        counter.record(layer, ids((0, 1), (2, -1)))
    total = counter.totals()
    assert total.layers == (3, 5)
    assert total.tokens_LE.tolist() == [[1, 1, 1, 0], [2, 2, 2, 0]]
    counter.record(3, ids((3, 3)))
    assert counter.totals().tokens_LE.tolist() == [[1, 1, 1, 2], [2, 2, 2, 0]]


def test_before_the_first_choice() -> None:
    total = RoutedTokensCounter(4).totals()
    assert (total.layers, total.tokens_LE.shape) == ((), (0, 4))
    assert RoutedTokens.decode(total.encoded).tokens_LE.shape == (0, 4)


def test_the_file_is_written_when_there_is_news(tmp_path: Path) -> None:
    file = RoutedTokensFile(tmp_path / "tokens")
    counter = RoutedTokensCounter(4, file)
    counter.tend(10.0)
    assert file.read() is None
    counter.record(1, ids((0, 1)))
    counter.tend(10.1)  # too early to look
    counter.tend(20.0)
    read = file.read()
    assert read is not None
    assert (read.layers, read.tokens_LE.tolist()) == ((1,), [[1, 1, 0, 0]])
    file.path.unlink()
    counter.tend(40.0)
    assert file.read() is None  # nothing new
    counter.record(1, ids((0, 1)))
    counter.tend(42.0)
    assert file.read() is not None


def test_counts_of_several_ranks_add_up() -> None:
    one = RoutedTokens((1, 2), np.array([[1, 0], [0, 2]]))
    other = RoutedTokens((2, 7), np.array([[5, 5], [1, 1]]))
    total = RoutedTokens.added([one, other])
    assert total is not None
    assert (total.layers, total.tokens_LE.tolist()) == ((1, 2, 7), [[1, 0], [5, 7], [1, 1]])
    assert RoutedTokens.added([]) is None


@pytest.mark.parametrize("data", [b"", b"{}\n", b'{"layers": [1], "experts": 4}\n1234', b"no JSON\n"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        RoutedTokens.decode(data)
