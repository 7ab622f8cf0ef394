"""Arithmetic on shares of experts."""

from __future__ import annotations

from routing.tokens.share import Share, first_bytes, without


def count(share: Share) -> int:
    return 10 * sum(map(len, share.values()))


def test_without() -> None:
    assert without({1: (1, 2, 3), 2: (4,), 3: ()}, {1: (2,), 2: (4, 5), 9: (1,)}) == {1: (1, 3)}
    assert without({}, {1: (2,)}) == {}


def test_the_first_are_as_many_as_fit_and_one_at_least() -> None:
    share = {1: (5, 6), 2: (7, 8)}
    assert first_bytes(share, 30, count) == {1: (5, 6), 2: (7,)}
    assert first_bytes(share, 1, count) == {1: (5,)}
    assert first_bytes(share, 100, count) == share
    assert first_bytes({}, 100, count) == {}
