"""Slots of pools that grow and shrink."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan.shares import split_shares
from routing.tokens.worker_slots import WorkerSlots

EXPERTS = 12
NOTHING: dict[int, np.ndarray] = {}


def slots_of(pools: list[str], fixed: tuple[str, ...] = (), replicas: int = 1) -> WorkerSlots:
    shares = []
    for ids in split_shares(EXPERTS, [1.0] * len(pools), replicas):
        shares.append(np.zeros((1, EXPERTS), dtype=bool))
        shares[-1][0, list(ids)] = True
    return WorkerSlots(shares, pools, fixed)


def test_a_pool_grows_up_to_what_is_wanted_of_it() -> None:
    slots = slots_of(["a", "b"])
    assert slots.add("a", []) is None
    slots.resize({"a": 3, "unknown": 4})
    assert not slots.complete()
    assert [slots.add("a", [2]), slots.add("a", []), slots.add("a", []), slots.add("b", [])] == [3, 2, None, None]
    assert slots.complete()
    assert (slots.of("a"), slots.of("b")) == ([0, 2, 3], [1])
    assert sorted(int(slots.share(slot).sum()) for slot in range(4)) == [3, 3, 3, 3]
    assert set(slots.first_experts.values()) == {3}


def test_a_fixed_pool_keeps_its_slots_and_their_shares() -> None:
    slots = slots_of(["gpu", "cpu", "cpu"], fixed=("gpu",))
    gpus = slots.share(0).copy()
    slots.resize({"gpu": 5, "cpu": 3})
    assert slots.add("gpu", []) is None
    assert slots.add("cpu", []) == 3
    slots.resize({"gpu": 0, "cpu": 1})
    slots.give_up([], NOTHING)
    assert (slots.of("gpu"), slots.of("cpu")) == ([0], [1])
    assert (slots.share(0) == gpus).all()
    assert (slots.share(1) == ~gpus).all()  # all that the GPU worker does not have
    assert not slots.share(2).any()


def test_live_slots_stay_until_their_workers_leave() -> None:
    slots = slots_of(["", "", ""])
    slots.resize({"": 1})
    slots.give_up([0, 1, 2], NOTHING)
    assert slots.of("") == [0, 1, 2]
    slots.give_up([1], NOTHING)
    assert slots.of("") == [1]
    assert slots.share(1).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(1, 4)), max_size=8), st.integers(1, 2))
def test_every_expert_has_its_copies_whatever_grows_and_shrinks(steps: list[tuple[str, int]], replicas: int) -> None:
    slots = slots_of(["x", "x", "y", "fixed"], ("fixed",), replicas)
    for pool, count in steps:
        slots.resize({pool: count})
        while slots.add(pool, []) is not None:
            pass
        slots.give_up([], NOTHING)
        assert slots.complete()
        assert (np.sum(list(slots.shares_LE.values()), axis=0) >= min(replicas, len(slots.shares_LE))).all()
