"""Membership: slots, stamps and silence, with an injected clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from routing.tokens.membership import Membership, WorkerMember
from routing.tokens.placement import NO_TABLE, PlacementTable, Stamp

SHARES = [{1: (0, 1)}, {1: (2, 3)}]


def make(now_s: float = 0.0) -> Membership:
    return Membership(SHARES, heartbeat_timeout_s=5.0, now_s=now_s, incarnation=7)


def ready(name: str, slot: int, **said: object) -> WorkerMember:
    held = (SHARES * 2)[slot]
    return replace(WorkerMember(name, slot, 100, "10.0.0.1", f"10.0.0.1:{slot}", "ready", held=held), **said)


def start(membership: Membership, name: str, now_s: float, seen: Stamp = NO_TABLE) -> WorkerMember:
    slot = membership.join(name, 100, "10.0.0.1", now_s)
    assert slot is not None
    member = ready(name, slot)
    assert membership.register(member, seen, now_s)
    return member


def table_at(membership: Membership, now_s: float) -> PlacementTable | None:
    membership.expire(now_s)
    return membership.table()


def test_a_worker_takes_a_slot_of_its_pool() -> None:
    membership = Membership(SHARES, 5.0, 0.0, 7, pools=["gpu", "cpu"], fixed_pools=["gpu"])
    assert membership.join("a", 1, "n", 0.0, "cpu") == 1
    assert membership.join("b", 1, "n", 0.0, "cpu") is None  # although slot 0 is free
    assert membership.join("c", 1, "n", 0.0, "gpu") == 0
    assert membership.join("b", 1, "n", 6.0, "cpu") == 1  # a was silent
    assert membership.join("x", 1, "n", 6.0, "other") is None


def test_nothing_is_published_before_every_expert_has_a_holder() -> None:
    membership = make()
    start(membership, "a", 0.0)
    assert table_at(membership, 4.0) is None
    start(membership, "b", 4.0)
    table = table_at(membership, 4.0)
    assert table is not None
    assert table.stamp.n == 2
    assert [worker.address for worker in table.workers] == ["10.0.0.1:0", "10.0.0.1:1"]


def test_slots_are_exclusive_until_silence() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    assert membership.join("c", 1, "n", 4.0) is None
    membership.heartbeat("b", 0.0, 4.0)
    assert membership.join("c", 1, "n", 6.0) == 0  # a was silent for more than 5 s


def test_joining_twice_keeps_the_slot() -> None:
    membership = make()
    assert membership.join("a", 1, "n", 0.0) == membership.join("a", 1, "n", 1.0) == 0


def test_a_loss_and_a_return_are_two_tables() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    assert table_at(membership, 0.0) is not None
    assert membership.heartbeat("b", 0.0, 4.0)
    lost = table_at(membership, 6.0)
    assert lost is not None
    assert lost.stamp.n == 3
    assert [worker.worker_id for worker in lost.workers] == ["b"]
    start(membership, "c", 6.5)
    back = table_at(membership, 6.5)
    assert back is not None
    assert back.stamp.n == 4
    assert [worker.worker_id for worker in back.workers] == ["c", "b"]


def test_a_worker_that_was_given_up_too_early_comes_back_unless_replaced() -> None:
    membership = make()
    member = start(membership, "a", 0.0)
    assert not membership.heartbeat("a", 0.0, 9.0)
    assert membership.register(member, Stamp(7, 1), 9.0)
    start(membership, "b", 9.0)
    assert not membership.heartbeat("a", 0.0, 20.0)
    assert start(membership, "c", 20.0).slot == 0
    assert not membership.register(member, Stamp(7, 2), 20.0)


def test_a_new_directory_learns_from_its_workers_that_it_has_a_predecessor() -> None:
    membership = make(now_s=50.0)
    member = ready("a", 1)
    assert not membership.heartbeat("a", 0.0, 50.0)
    assert membership.register(member, Stamp(6, 17), 50.0)
    assert table_at(membership, 50.0) is None  # the other worker may still be alive
    for now_s in (52.0, 54.0):
        assert membership.heartbeat("a", 0.0, now_s)
    table = table_at(membership, 56.0)
    assert table is not None
    assert table.stamp.n > 17  # operators see one count
    assert [worker.worker_id for worker in table.workers] == ["a"]


@pytest.mark.parametrize("seen", [NO_TABLE, Stamp(7, 3)])
def test_a_first_directory_waits_for_every_expert(seen: Stamp) -> None:
    membership = make()
    start(membership, "a", 0.0, seen)
    membership.heartbeat("a", 0.0, 4.0)
    membership.heartbeat("a", 0.0, 8.0)
    assert table_at(membership, 9.0) is None


def test_two_directories_never_publish_under_the_same_stamp() -> None:
    """A fresh worker announces itself, and a replica polls with the stamp to which the successor has counted: it must
    hear of the worker all the same.
    """
    old, new = make(), Membership(SHARES, 5.0, 0.0, incarnation=8)
    for name in "ab":
        start(old, name, 0.0)
        start(new, name.upper(), 0.0)
    before, after = old.table(), new.table()
    assert before is not None
    assert after is not None
    new.observe(before.stamp)
    assert after.stamp.n == before.stamp.n
    assert after.stamp != before.stamp  # which is what a replica goes by


def test_an_expert_is_covered_as_long_as_one_of_its_holders_is_there() -> None:
    shares = [{1: (0, 1), 2: (0,)}, {1: (1, 2), 2: (0,)}]
    membership = Membership(shares, 5.0, 0.0, incarnation=7)
    assert membership.uncovered() == 4
    for slot, (name, left) in enumerate((("a", 1), ("b", 0))):
        assert membership.join(name, 1, "n", 0.0) == slot
        assert membership.register(ready(name, slot, held=shares[slot]), NO_TABLE, 0.0)
        assert membership.uncovered() == left
    membership.leave("a")
    assert membership.uncovered() == 1
    membership.leave("b")
    assert membership.uncovered() == 4


def test_a_worker_that_says_the_same_again_changes_no_table() -> None:
    membership = make()
    member, _ = start(membership, "a", 0.0), start(membership, "b", 0.0)
    table = membership.table()
    assert table is not None
    assert membership.register(replace(member, cores="0-3"), table.stamp, 1.0)
    assert membership.table() is table
    assert membership.register(replace(member, address="10.0.0.1:99"), table.stamp, 1.0)
    moved = membership.table()
    assert moved is not None
    assert moved.stamp != table.stamp
    assert moved.workers[0].address == "10.0.0.1:99"
    assert membership.uncovered() == 0


def test_leaving_in_good_order_is_seen_at_once() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    assert table_at(membership, 0.0) is not None
    membership.leave("a")
    membership.leave("nobody")
    table = table_at(membership, 0.0)
    assert table is not None
    assert table.stamp.n == 3
    assert membership.members() == [replace(membership.members()[0], worker_id="b")]


def test_a_ready_worker_keeps_its_slot_from_one_that_only_loads() -> None:
    membership = make(now_s=50.0)  # a new directory: a joiner comes before the old worker is heard
    assert membership.join("new", 1, "n", 50.0) == 0
    assert membership.register(WorkerMember("old", 0, 2, "n", "n:1", "ready"), NO_TABLE, 50.5)
    assert [member.worker_id for member in membership.members()] == ["old"]
    assert not membership.heartbeat("new", 0.0, 51.0)
    assert not membership.register(WorkerMember("new", 0, 1, "n", "", "loading"), NO_TABLE, 51.0)


@pytest.mark.parametrize("event", ["join", "register", "heartbeat", "expire"])
def test_each_loss_is_told_once_whichever_event_shows_it(event: str) -> None:
    lost: list[str] = []
    membership = Membership(SHARES, 5.0, 0.0, 7, lambda member: lost.append(member.worker_id))
    start(membership, "a", 0.0)
    other = start(membership, "b", 4.0)
    {
        "join": lambda: membership.join("c", 1, "n", 6.0),
        "register": lambda: membership.register(other, Stamp(7, 2), 6.0),
        "heartbeat": lambda: membership.heartbeat("b", 0.0, 6.0),
        "expire": lambda: membership.expire(6.0),
    }[event]()
    membership.expire(6.5)
    assert lost == ["a"]


def test_queries_change_nothing() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    for _ in range(2):  # silent since long ago, but no event has said so
        assert membership.table() is not None
        assert (len(membership.members()), membership.uncovered()) == (2, 0)
    membership.expire(99.0)
    assert (len(membership.members()), membership.uncovered()) == (0, 4)


def test_busy_are_ready_workers_of_the_pool_that_reported() -> None:
    membership = Membership(SHARES * 2, 5.0, 0.0, 7, pools=["x", "x", "x", "y"])
    assert membership.busy("x") is None
    for slot, (name, pool) in enumerate((("a", "x"), ("b", "x"), ("c", "x"), ("d", "y"))):
        assert membership.join(name, 1, "n", 0.0, pool) == slot
        if name != "c":  # it still loads
            assert membership.register(ready(name, slot, pool=pool), NO_TABLE, 0.0)
    assert membership.busy("x") is None
    for name, busy in (("a", 0.5), ("b", 0.75), ("c", 0.25), ("d", 0.125)):
        membership.heartbeat(name, busy, 0.0)
    assert (membership.busy("x"), membership.busy("y")) == (1.25, 0.125)


# --- others take over what nobody else has ---


def running(*, elastic: bool = True) -> tuple[Membership, dict[str, WorkerMember]]:
    """Three workers of a model with six experts, and a replica that has their table."""
    membership = Membership([{1: (0, 1)}, {1: (2, 3)}, {1: (4, 5)}], 5.0, 0.0, incarnation=7)
    members = {}
    for slot, name in enumerate("abc"):
        membership.join(name, 1, "n", 0.0)
        members[name] = WorkerMember(
            name, slot, 1, "n", f"n:{slot}", "ready", held=membership.share(slot), elastic=elastic
        )
        assert membership.register(members[name], NO_TABLE, 0.0)
    follow(membership)
    return membership, members


def follow(membership: Membership) -> PlacementTable:
    """The replica has the newest table."""
    table = membership.table()
    assert table is not None
    membership.followed([table.stamp])
    return table


def obey(membership: Membership, members: dict[str, WorkerMember], name: str) -> None:
    """A worker holds what it is told to hold, and says so."""
    members[name] = replace(members[name], held=membership.keeps(name))
    assert membership.register(members[name], NO_TABLE, 1.0)


def holders(table: PlacementTable) -> dict[int, list[str]]:
    names = [worker.worker_id for worker in table.workers]
    return {e: [names[w] for w in row if w >= 0] for e, row in enumerate(table.holders_LER[0].tolist())}


def test_the_experts_of_a_lost_worker_go_to_the_others_and_back() -> None:
    membership, members = running()
    membership.leave("c")
    assert (membership.keeps("a"), membership.keeps("b")) == ({1: (0, 1, 4)}, {1: (2, 3, 5)})
    assert membership.uncovered() == 2
    obey(membership, members, "a")
    obey(membership, members, "b")
    assert membership.uncovered() == 0
    assert holders(follow(membership)) == {0: ["a"], 1: ["a"], 2: ["b"], 3: ["b"], 4: ["a"], 5: ["b"]}

    assert membership.join("d", 1, "n", 1.0) == 2
    assert membership.keeps("a") == {1: (0, 1, 4)}  # d only loads
    members["d"] = replace(members["c"], worker_id="d", address="n:9")
    assert membership.register(members["d"], NO_TABLE, 1.0)
    assert membership.keeps("a") == {1: (0, 1, 4)}  # the replica's table still names it
    assert holders(follow(membership))[4] == ["d"]
    assert (membership.keeps("a"), membership.keeps("b")) == ({1: (0, 1)}, {1: (2, 3)})


def test_a_taker_that_is_lost_too_is_replaced_and_the_rest_stays() -> None:
    membership, members = running()
    membership.leave("c")
    obey(membership, members, "a")
    obey(membership, members, "b")
    membership.leave("a")
    assert membership.keeps("b") == {1: (0, 1, 2, 3, 4, 5)}


def test_a_taker_that_has_no_room_is_passed_over() -> None:
    membership, members = running()
    members["a"] = replace(members["a"], elastic=False)
    assert membership.register(members["a"], NO_TABLE, 1.0)
    membership.leave("c")
    assert (membership.keeps("a"), membership.keeps("b")) == ({1: (0, 1)}, {1: (2, 3, 4, 5)})


def test_nobody_takes_over_where_workers_cannot_load_more() -> None:
    membership, _ = running(elastic=False)
    membership.leave("c")
    assert (membership.keeps("a"), membership.keeps("b")) == ({1: (0, 1)}, {1: (2, 3)})
    assert membership.uncovered() == 2


def test_nobody_takes_over_what_is_only_starting() -> None:
    membership = Membership(SHARES, 5.0, 0.0, incarnation=7)
    membership.join("a", 1, "n", 0.0)
    membership.join("b", 1, "n", 0.0)
    assert membership.register(ready("a", 0, elastic=True), NO_TABLE, 0.0)
    assert membership.keeps("a") == SHARES[0]


def test_a_worker_leaves_once_others_hold_its_experts_and_replicas_know() -> None:
    membership, members = running()
    assert not membership.retire("c")
    assert membership.keeps("c") == {1: (4, 5)}  # it serves on
    obey(membership, members, "a")
    obey(membership, members, "b")
    assert not membership.retire("c")  # the replica's table still names it
    assert "c" not in [worker.worker_id for worker in follow(membership).workers]
    assert membership.retire("c")
    assert membership.join("d", 1, "n", 1.0) == 2  # its slot is free
    membership.leave("c")
    assert membership.retire("nobody")


def test_a_replica_with_another_directorys_table_holds_everything_up() -> None:
    membership, members = running()
    membership.leave("c")
    obey(membership, members, "a")
    obey(membership, members, "b")
    membership.join("d", 1, "n", 1.0)
    assert membership.register(replace(members["c"], worker_id="d"), NO_TABLE, 1.0)
    table = membership.table()
    assert table is not None
    membership.followed([table.stamp, Stamp(6, 1000), NO_TABLE])
    assert membership.keeps("a") == {1: (0, 1, 4)}
    membership.followed([table.stamp, NO_TABLE])
    assert membership.keeps("a") == {1: (0, 1)}


def share(**held: list[int]) -> dict[str, np.ndarray]:
    masks = {name: np.zeros((1, 4), dtype=bool) for name in held}
    for name, ids in held.items():
        masks[name][0, ids] = True
    return masks


def settled_pair(membership: Membership) -> tuple[WorkerMember, WorkerMember]:
    pair = start(membership, "a", 0.0), start(membership, "b", 0.0)
    for member in pair:
        assert membership.register(replace(member, elastic=True), NO_TABLE, 0.0)
    assert membership.settled()
    return pair


def test_shares_that_change_are_moves_and_outlive_their_workers() -> None:
    membership = make()
    a, b = settled_pair(membership)
    masks = share(a=[0], b=[1, 2, 3])
    membership.reshare(masks, {name: mask_LE + 1e-3 for name, mask_LE in masks.items()})
    assert not membership.settled()
    assert membership.keeps("b") == {1: (1, 2, 3)}
    assert membership.keeps("a") == {1: (0, 1)}  # until the other has it
    assert membership.register(replace(b, elastic=True, held={1: (1, 2, 3)}), NO_TABLE, 1.0)
    table = membership.table()
    assert table is not None
    membership.followed([table.stamp])
    assert membership.keeps("a") == {1: (0,)}
    assert membership.register(replace(a, elastic=True, held={1: (0,)}), NO_TABLE, 2.0)
    assert membership.settled()
    membership.leave("b")
    assert membership.join("c", 1, "n", 3.0) == b.slot
    assert membership.share_of("c") == {1: (1, 2, 3)}


def test_weights_are_in_the_table() -> None:
    membership = make()
    a, _ = settled_pair(membership)
    masks = share(a=[0, 1, 2], b=[2, 3])
    weights = {"a": np.array([[1, 1, 0.25, 0]]), "b": np.array([[0, 0, 0.75, 1]])}
    membership.reshare(masks, weights)
    assert membership.register(replace(a, elastic=True, held={1: (0, 1, 2)}), NO_TABLE, 1.0)
    table = membership.table()
    assert table is not None
    assert table.weights_LER[0, 2].tolist() == [0.25, 0.75]


def test_a_new_directory_learns_shares_from_workers() -> None:
    successor = Membership(SHARES, heartbeat_timeout_s=5.0, now_s=100.0, incarnation=8)
    moved = {1: (1, 2, 3)}
    seen = Stamp(7, 9)
    assert successor.register(ready("b", 1, held=moved, share=moved, elastic=True), seen, 100.0)
    assert successor.register(ready("a", 0, held={1: (0,)}, share={1: (0,)}, elastic=True), seen, 100.0)
    assert successor.keeps("b") == moved
    assert successor.settled()




def test_unsettled_are_workers_that_load_leave_or_are_missing() -> None:
    membership = make()
    a, _ = settled_pair(membership)
    membership.retire("a")
    assert not membership.settled()
    membership.leave("a")
    assert not membership.settled()
    membership.join("c", 1, "n", 0.0)
    assert not membership.settled()
    assert membership.register(replace(a, worker_id="c"), NO_TABLE, 0.0)
    assert not membership.settled()  # it cannot load and drop


def test_more_slots_come_with_their_workers_and_take_from_the_others() -> None:
    membership = make()
    settled_pair(membership)
    assert membership.join("c", 1, "n", 0.0) is None
    membership.resize({"": 3})
    slot = membership.join("c", 1, "n", 0.0)
    assert slot == 2
    assert membership.join("d", 1, "n", 0.0) is None
    taken = membership.share(slot)
    assert sum(map(len, taken.values())) == 1
    giver = next(name for name in "ab" if len(membership.share_of(name)[1]) == 1)
    assert set(taken[1]) <= set(membership.keeps(giver)[1])  # until the new one has it
    member = replace(ready("c", 0), slot=slot, held=taken, elastic=True)
    assert membership.register(member, NO_TABLE, 1.0)
    table = membership.table()
    assert table is not None
    membership.followed([table.stamp])
    assert set(taken[1]).isdisjoint(membership.keeps(giver)[1])
    assert membership.first_experts()["c"] == 1  # of 4 in 3 slots


def test_fewer_slots_wait_for_whoever_leaves() -> None:
    membership = make()
    _, b = settled_pair(membership)
    membership.resize({"": 1})
    assert membership.shares().keys() == {"a", "b"}  # both are alive: Serve chooses which one goes
    assert not membership.retire("a")
    assert membership.share_of("a") == {}
    assert membership.keeps("b") == {1: (0, 1, 2, 3)}
    assert membership.keeps("a") == {1: (0, 1)}
    assert membership.register(replace(b, elastic=True, held={1: (0, 1, 2, 3)}), NO_TABLE, 1.0)
    table = membership.table()
    assert table is not None
    membership.followed([table.stamp])
    assert membership.retire("a")
    membership.leave("a")
    assert membership.settled()
    assert membership.join("c", 1, "n", 2.0) is None  # the slot is gone
    assert membership.uncovered() == 0


def test_a_slot_that_is_empty_already_goes_at_once() -> None:
    membership = make()
    settled_pair(membership)
    membership.leave("a")
    membership.resize({"": 1})
    assert membership.join("c", 1, "n", 0.0) is None
    assert membership.keeps("b") == {1: (0, 1, 2, 3)}
    assert membership.share_of("b") == {1: (0, 1, 2, 3)}


def test_a_new_directory_learns_of_slots_it_was_not_configured_with() -> None:
    successor = Membership(SHARES, heartbeat_timeout_s=5.0, now_s=100.0, incarnation=8)
    successor.resize({"": 3})  # heartbeats say so
    for slot, ids in enumerate([(0,), (2, 3), (1,)]):
        member = replace(ready(f"w{slot}", 0), slot=slot, held={1: ids}, share={1: ids}, elastic=True)
        assert successor.register(member, Stamp(7, 9), 100.0)
    assert successor.settled()
    assert successor.join("late", 1, "n", 100.0) is None


def test_a_worker_that_may_stay_waits_for_somebody_to_take_its_experts() -> None:
    membership = make()
    settled_pair(membership)
    assert membership.register(ready("b", 1, elastic=False), NO_TABLE, 1.0)  # out of memory
    assert not membership.retire("a", whatever_comes=False)
    assert membership.retire("a")


def test_registering_again_keeps_what_heartbeats_said() -> None:
    membership = make()
    a, _ = settled_pair(membership)
    membership.heartbeat("a", 0.5, 1.0, speed=3.0, free_bytes=7)
    assert membership.register(replace(a, elastic=True), NO_TABLE, 2.0)
    known = membership.members()[0]
    assert (known.busy, known.speed, known.free_bytes) == (0.5, 3.0, 7)


def test_weights_and_decided_shares_are_the_slots() -> None:
    membership = make()
    settled_pair(membership)
    masks = share(a=[0, 1, 2], b=[2, 3])
    membership.reshare(masks, {"a": np.full((1, 4), 0.25), "b": np.full((1, 4), 0.75)})
    membership.leave("a")
    assert membership.join("c", 1, "n", 2.0) == 0
    # A late word of an old process does not change what was decided since.
    old = ready("c", 0, held={1: (0, 1, 2)}, share={1: (0, 1)}, elastic=True)
    assert membership.register(old, NO_TABLE, 3.0)
    assert membership.share_of("c") == {1: (0, 1, 2)}
    table = membership.table()
    assert table is not None
    assert table.weights_LER[0, 2].tolist() == [0.25, 0.75]
