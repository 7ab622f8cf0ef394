"""Moves of experts: whatever is wanted, whoever dies, nobody drops what a table in use still lists."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from routing.tokens.holdings import Holdings

LAYERS, EXPERTS = (3, 5), 4
MASKS = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda bits: np.array(bits).reshape(2, 4))
NAMES = st.sampled_from("abc")


def test_masks_and_shares_are_each_others_inverse() -> None:
    holdings = Holdings(LAYERS, EXPERTS)
    assert holdings.share(holdings.mask({5: (3, 1)})) == {5: (1, 3)}
    assert holdings.share(holdings.mask({4: (1,), 3: (-1, 4)})) == {}  # not of this model


def test_a_table_lists_wanted_holders_and_any_holder_where_none_is_wanted() -> None:
    holdings = Holdings((1,), 3)
    for name, wanted in (("a", (0, 1)), ("b", (1, 2))):
        holdings.join(name, holdings.mask({1: wanted}))
    holdings.hold("a", holdings.mask({1: (0, 1, 2)}))
    assert (holdings.listed("a"), holdings.listed("b"), holdings.tables) == ({1: (0, 1, 2)}, {}, 1)
    holdings.hold("b", holdings.mask({1: (1, 2)}))
    assert (holdings.listed("a"), holdings.listed("b"), holdings.tables) == ({1: (0, 1)}, {1: (1, 2)}, 2)
    assert holdings.holder_counts().tolist() == [[1, 2, 2]]
    holdings.leave("b")
    assert (holdings.listed("a"), holdings.tables) == ({1: (0, 1, 2)}, 4)
    holdings.hold("a", holdings.mask({1: (0, 1, 2)}))
    assert holdings.tables == 4  # nothing new


class Moves(RuleBasedStateMachine):
    """Three workers that obey, in any order, and one replica that follows, late."""

    @initialize()
    def start(self) -> None:
        self.holdings = Holdings(LAYERS, EXPERTS)
        self.held: dict[str, np.ndarray] = {}
        self.wanted: dict[str, np.ndarray] = {}
        self.tables = {0: dict[str, np.ndarray]()}  # what each published table listed
        self.used = 0  # by the replica

    @rule(name=NAMES, wanted=MASKS)
    def join_or_want(self, name: str, wanted: np.ndarray) -> None:
        if name in self.held:
            self.holdings.want(name, wanted)
        else:
            self.holdings.join(name, wanted)
            self.held[name] = np.zeros((2, 4), dtype=bool)
        self.wanted[name] = wanted

    @precondition(lambda self: self.held)
    @rule(data=st.data(), some=MASKS)
    def load(self, data: st.DataObject, some: np.ndarray) -> None:
        """A worker loads some of what it is to hold, and says so."""
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.held[name] = self.held[name] | (self.holdings.keeps(name) & some)
        self.holdings.hold(name, self.held[name])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A worker drops what it is not to hold."""
        name = data.draw(st.sampled_from(sorted(self.held)))
        dropped = self.held[name] & ~self.holdings.keeps(name)
        for number, listed in self.tables.items():
            if number >= self.used and name in listed:
                assert not (listed[name] & dropped).any(), f"table {number} is in use and lists it"
        self.held[name] = self.held[name] & ~dropped
        self.holdings.hold(name, self.held[name])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.holdings.leave(name)
        del self.held[name], self.wanted[name]

    @rule(newest=st.booleans())
    def follow(self, newest: bool) -> None:
        """The replica takes over a newer table, and the directory hears of it."""
        later = [number for number in self.tables if number > self.used]
        if later:
            self.used = max(later) if newest else min(later)
        self.holdings.acknowledge(self.used)

    @invariant()
    def publish(self) -> None:
        if not hasattr(self, "held"):
            return
        listed = {name: self.holdings.mask(self.holdings.listed(name)) for name in self.held}
        before = self.tables.get(self.holdings.tables)
        if before is not None:
            live = {name: mask for name, mask in before.items() if mask.any()}
            assert {name: mask.tolist() for name, mask in live.items()} == {
                name: mask.tolist() for name, mask in listed.items() if mask.any()
            }, "two tables with the same number"
        self.tables[self.holdings.tables] = listed
        for at in np.ndindex(2, 4):
            holders = {name for name, held in self.held.items() if held[at]}
            named = {name for name, mask in listed.items() if mask[at]}
            wanted = {name for name in holders if self.wanted[name][at]}
            assert named == (wanted or holders)
            assert self.holdings.holder_counts()[at] == len(holders)

    def teardown(self) -> None:
        """When nothing more happens, everybody comes to hold what is wanted, and what nobody else has."""
        if not hasattr(self, "held"):
            return
        for _ in range(3):
            for name in self.held:
                self.held[name] = self.holdings.keeps(name)
                self.holdings.hold(name, self.held[name])
            self.holdings.acknowledge(self.holdings.tables)
        anybody = np.logical_or.reduce([np.zeros((2, 4), dtype=bool), *self.wanted.values()])
        for name, held in self.held.items():
            assert (held & anybody).tolist() == self.wanted[name].tolist()


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
