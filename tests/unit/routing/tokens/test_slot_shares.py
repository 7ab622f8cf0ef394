"""Shares when workers are lost, come or go: every expert stays somewhere, counts stay level."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan.shares import split_shares
from routing.tokens.slot_shares import with_enough, with_one_more, with_orphans

LAYERS = 2


def shares_of(experts: int, slots: int, replicas: int) -> dict[int, np.ndarray]:
    made = {}
    for slot, ids in enumerate(split_shares(experts, [1.0] * slots, replicas)):
        made[slot] = np.zeros((LAYERS, experts), dtype=bool)
        made[slot][:, list(ids)] = True
    return made


def counts(shares: dict[int, np.ndarray]) -> np.ndarray:
    return np.sum(list(shares.values()), axis=0)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[int, int, int]:
    replicas = draw(st.integers(1, 3))
    slots = draw(st.integers(replicas, 6))
    return draw(st.integers(slots, 24)), slots, replicas


@settings(max_examples=150, deadline=None)
@given(fleets())
def test_a_new_slot_takes_its_part_and_no_expert_is_lost(fleet: tuple[int, int, int]) -> None:
    experts, slots, replicas = fleet
    shares = shares_of(experts, slots, replicas)
    more = with_one_more(shares, slots)
    assert (counts(more) == replicas).all()
    assert more[slots].sum(axis=1).tolist() == [experts * replicas // (slots + 1)] * LAYERS
    for slot, before in shares.items():
        assert not (more[slot] & ~before).any()  # nobody else has to load anything
    assert max(int(share.sum()) for share in more.values()) <= max(int(share.sum()) for share in shares.values())


@settings(max_examples=150, deadline=None)
@given(fleets(), st.randoms(use_true_random=False))
def test_what_a_slot_gives_up_goes_to_others_once(fleet: tuple[int, int, int], random) -> None:  # type: ignore[no-untyped-def]
    experts, slots, replicas = fleet
    shares = shares_of(experts, slots, replicas)
    needed = counts(shares) > 0
    del shares[random.randrange(slots)]
    if not shares:
        return
    enough = with_enough(shares, replicas * needed, {})
    assert (counts(enough) == min(replicas, len(shares))).all()
    for slot, before in shares.items():
        assert not (before & ~enough[slot]).any()


def test_what_is_held_already_is_not_loaded_again() -> None:
    shares = {0: np.array([[True, True, False, False]]), 1: np.array([[False, False, True, False]])}
    needed = np.ones((1, 4), dtype=bool)
    assert with_enough(shares, needed, {})[1][0, 3]  # the smallest share
    assert with_enough(shares, needed, {0: needed})[0][0, 3]  # but it is there already


def test_orphans_are_divided_by_count_and_by_what_is_there() -> None:
    wanted = {"a": np.array([[True, False, False, False]]), "b": np.array([[False, False, False, True]])}
    orphans = np.array([[False, True, True, False]])
    taken = with_orphans(orphans, wanted, {"a": np.zeros((1, 4), bool), "b": np.array([[False, True, True, False]])})
    assert taken["b"].tolist() == [[False, True, True, True]]
    taken = with_orphans(orphans, wanted, {name: np.zeros((1, 4), bool) for name in wanted})
    assert [int(mask.sum()) for mask in taken.values()] == [2, 2]
