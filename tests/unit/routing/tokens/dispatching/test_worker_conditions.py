"""The conditions of workers, event by event."""

from __future__ import annotations

from routing.tokens.dispatching.worker_conditions import WorkerConditions
from routing.tokens.placement import Stamp


def test_a_lost_worker_is_out_for_a_while_or_until_it_answers() -> None:
    lost = WorkerConditions().lost("a", 100.0).lost("b", 105.0)
    assert lost.excluded(10.0, 106.0) == {"a", "b"}
    assert lost.excluded(10.0, 111.0) == {"b"}
    assert lost.excluded(0.2, 106.0) == frozenset()
    assert lost.answered("b").excluded(10.0, 106.0) == {"a"}
    assert lost.lost("a", 108.0).excluded(10.0, 111.0) == {"a", "b"}


def test_a_late_worker_is_out_for_a_second_at_most() -> None:
    late = WorkerConditions().late("a", 100.0)
    assert not late.all_well
    assert late.excluded(10.0, 100.9) == {"a"}
    assert late.excluded(0.2, 100.9) == frozenset()  # where nobody else has its experts
    assert late.excluded(10.0, 101.1) == frozenset()
    assert late.answered("a").all_well
    assert late.adopted(Stamp(1, 1), set()).all_well


def test_a_worker_that_is_set_aside_is_out_for_good() -> None:
    aside = WorkerConditions().set_aside("a", "worker_unusable").lost("b", 100.0)
    assert aside.excluded(0.0, 1e9) == {"a"}
    assert aside.answered("a").excluded(0.0, 1e9) == {"a"}


def test_a_stale_entry_is_of_one_worker_layer_and_expert() -> None:
    stale = WorkerConditions(Stamp(1, 3)).found_stale("a", 1, {4, 5}, Stamp(1, 3)).found_stale("b", 1, {5}, Stamp(1, 3))
    assert stale.stale == {1: {4: {"a"}, 5: {"a", "b"}}}
    assert stale.excluded(10.0, 0.0) == frozenset()
    assert not stale.all_well
    assert WorkerConditions(Stamp(1, 3)).all_well


def test_what_another_table_said_is_no_news() -> None:
    newer = WorkerConditions(Stamp(1, 4))
    assert newer.found_stale("a", 1, {4}, Stamp(1, 3)) is newer
    assert newer.found_stale("a", 1, {4}, Stamp(2, 4)) is newer


def test_a_new_table_forgets_stale_entries_and_who_left() -> None:
    before = WorkerConditions(Stamp(1, 3)).lost("a", 1.0).lost("b", 1.0).set_aside("c", "x").set_aside("d", "y")
    after = before.found_stale("a", 1, {4}, Stamp(1, 3)).adopted(Stamp(1, 4), {"a", "c"})
    assert after == WorkerConditions(Stamp(1, 4), {"a": 1.0}, {}, {"c": "x"})
