"""Membership: slots, epochs and silence, with an injected clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing.tokens.membership import Membership, WorkerMember
from routing.tokens.placement import PlacementTable

SHARES = [{1: (0, 1)}, {1: (2, 3)}]


def make(now_s: float = 0.0) -> Membership:
    return Membership(SHARES, heartbeat_timeout_s=5.0, now_s=now_s)


def start(membership: Membership, name: str, now_s: float, seen_epoch: int = 0) -> WorkerMember:
    slot = membership.join(name, 100, "10.0.0.1", now_s)
    assert slot is not None
    member = WorkerMember(name, slot, 100, "10.0.0.1", f"10.0.0.1:{slot}", "ready")
    assert membership.register(member, seen_epoch, now_s)
    return member


def table_at(membership: Membership, now_s: float) -> PlacementTable | None:
    membership.expire(now_s)
    return membership.table()


def test_a_worker_takes_a_slot_of_its_pool() -> None:
    membership = make()
    assert membership.join("a", 1, "n", 0.0, slots=range(1, 2)) == 1
    assert membership.join("b", 1, "n", 0.0, slots=range(1, 2)) is None  # although slot 0 is free
    assert membership.join("c", 1, "n", 0.0, slots=range(1)) == 0
    assert membership.join("b", 1, "n", 6.0, slots=range(1, 2)) == 1  # a was silent


def test_nothing_is_published_before_every_expert_has_a_holder() -> None:
    membership = make()
    start(membership, "a", 0.0)
    assert table_at(membership, 4.0) is None
    start(membership, "b", 4.0)
    table = table_at(membership, 4.0)
    assert table is not None
    assert table.epoch == 2
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


def test_a_loss_and_a_return_are_two_epochs() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    assert table_at(membership, 0.0) is not None
    assert membership.heartbeat("b", 0.0, 4.0)
    lost = table_at(membership, 6.0)
    assert lost is not None
    assert lost.epoch == 3
    assert [worker.worker_id for worker in lost.workers] == ["b"]
    start(membership, "c", 6.5)
    back = table_at(membership, 6.5)
    assert back is not None
    assert back.epoch == 4
    assert [worker.worker_id for worker in back.workers] == ["c", "b"]


def test_a_worker_that_was_given_up_too_early_comes_back_unless_replaced() -> None:
    membership = make()
    member = start(membership, "a", 0.0)
    assert not membership.heartbeat("a", 0.0, 9.0)
    assert membership.register(member, 1, 9.0)
    start(membership, "b", 9.0)
    assert not membership.heartbeat("a", 0.0, 20.0)
    assert start(membership, "c", 20.0).slot == 0
    assert not membership.register(member, 2, 20.0)


def test_a_new_directory_learns_from_its_workers_and_epochs_keep_growing() -> None:
    membership = make(now_s=50.0)
    member = WorkerMember("a", 1, 100, "n", "n:1", "ready")
    assert not membership.heartbeat("a", 0.0, 50.0)
    assert membership.register(member, 17, 50.0)
    assert table_at(membership, 50.0) is None  # the other worker may still be alive
    for now_s in (52.0, 54.0):
        assert membership.heartbeat("a", 0.0, now_s)
    table = table_at(membership, 56.0)
    assert table is not None
    assert table.epoch == 18
    assert [worker.worker_id for worker in table.workers] == ["a"]


def test_leaving_in_good_order_is_seen_at_once() -> None:
    membership = make()
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    assert table_at(membership, 0.0) is not None
    membership.leave("a")
    membership.leave("nobody")
    table = table_at(membership, 0.0)
    assert table is not None
    assert table.epoch == 3
    assert membership.members() == [replace(membership.members()[0], worker_id="b")]


def test_a_ready_worker_keeps_its_slot_from_one_that_only_loads() -> None:
    membership = make(now_s=50.0)  # a new directory: a joiner comes before the old worker is heard
    assert membership.join("new", 1, "n", 50.0) == 0
    assert membership.register(WorkerMember("old", 0, 2, "n", "n:1", "ready"), 7, 50.5)
    assert [member.worker_id for member in membership.members()] == ["old"]
    assert not membership.heartbeat("new", 0.0, 51.0)
    assert not membership.register(WorkerMember("new", 0, 1, "n", "", "loading"), 7, 51.0)


def test_epochs_go_on_from_what_attention_replicas_know() -> None:
    membership = make()
    membership.observe_epoch(40)
    start(membership, "a", 0.0)
    start(membership, "b", 0.0)
    table = table_at(membership, 0.0)
    assert table is not None
    assert table.epoch == 42


@pytest.mark.parametrize("event", ["join", "register", "heartbeat", "expire"])
def test_each_loss_is_told_once_whichever_event_shows_it(event: str) -> None:
    lost: list[str] = []
    membership = Membership(SHARES, 5.0, 0.0, lambda member: lost.append(member.worker_id))
    start(membership, "a", 0.0)
    other = start(membership, "b", 4.0)
    {
        "join": lambda: membership.join("c", 1, "n", 6.0),
        "register": lambda: membership.register(other, 2, 6.0),
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


def test_only_ready_workers_that_reported_count_as_busy() -> None:
    membership = make()
    assert membership.busy() == 0.0
    start(membership, "a", 0.0)
    assert membership.busy() == 0.0
    membership.heartbeat("a", 0.5, 0.0)
    membership.join("b", 1, "n", 0.0)
    membership.heartbeat("b", 0.9, 0.0)  # still loading
    assert membership.busy() == 0.5
