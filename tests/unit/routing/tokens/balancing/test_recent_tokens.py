"""Recent loads of several replicas, on a clock that is set by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from routing.tokens.balancing.recent_tokens import RecentTokens
from routing.tokens.routed_tokens import RoutedTokens


def total(*tokens: list[int], layers: tuple[int, ...] = (3, 4)) -> RoutedTokens:
    return RoutedTokens(layers, np.array(tokens, dtype=np.int64))


def test_only_what_is_new_counts_and_it_fades() -> None:
    recent = RecentTokens((3, 4), 2, memory_s=100.0)
    assert recent.at(0.0).tolist() == [[0, 0], [0, 0]]
    recent.report("a", total([1000, 1000], [1000, 1000]), 0.0)  # from before this directory
    recent.report("a", total([1010, 1000], [1000, 1020]), 10.0)
    recent.report("b", total([7, 7], [7, 7]), 10.0)
    assert recent.at(10.0).tolist() == [[10, 0], [0, 20]]
    assert recent.at(110.0)[0, 0] == pytest.approx(10 * math.exp(-1))
    recent.report("b", total([7, 8], [7, 7]), 110.0)
    assert recent.at(110.0)[0, 1] == 1


def test_a_replica_that_is_gone_may_come_back_anew() -> None:
    recent = RecentTokens((3, 4), 2, memory_s=1e9)
    recent.report("a", total([5, 5], [5, 5]), 0.0)
    recent.keep_only([])
    recent.report("a", total([9, 9], [9, 9]), 1.0)  # where it stands, again
    assert not recent.at(1.0).any()
    recent.report("a", total([1, 1], [1, 1]), 2.0)  # never negative
    assert not recent.at(2.0).any()


def test_other_layers_and_experts_are_left_out() -> None:
    recent = RecentTokens((3, 4), 2, memory_s=1e9)
    recent.report("a", total([0, 0, 0], layers=(9,)), 0.0)
    recent.report("a", total([1, 2, 3], [4, 5, 6], layers=(9, 4)), 1.0)
    assert recent.at(1.0).tolist() == [[0, 0], [4, 5]]
