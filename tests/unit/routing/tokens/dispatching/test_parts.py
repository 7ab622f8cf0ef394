"""The client's parts that need no worker: the loss book, the watchdog, the placement watch."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.errors import WorkerLost
from routing.tokens.dispatching.loss_book import LossBook
from routing.tokens.dispatching.placement_watch import PlacementWatch
from routing.tokens.dispatching.watchdog import Watchdog
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint


def test_a_lost_worker_is_out_until_it_answers_or_leaves() -> None:
    book = LossBook()
    book.lose("a", WorkerLost("a went"), "")
    book.lose("b", WorkerLost("b went"), "")
    assert book.within(60.0) == {"a", "b"}
    assert book.within(-1.0) == frozenset()
    assert book.explain() == "; last lost: b went"
    book.answered("a")
    assert book.within(60.0) == {"b"}
    book.keep({"a"})
    assert book.within(60.0) == frozenset()


def test_a_chore_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    turns, enough = 0, threading.Event()

    def fail() -> None:
        raise OSError("no such file")

    def work() -> None:
        nonlocal turns
        turns += 1
        if turns == 5:
            enough.set()

    dog = Watchdog(0.001, (fail, work))
    assert enough.wait(10)
    dog.stop()
    assert [record.message for record in caplog.records] == ["dispatch watchdog: OSError('no such file')"]


def test_a_new_table_is_prepared_before_it_is_used(tmp_path: Path) -> None:
    file = PlacementFile(tmp_path / "placement")
    seen: list[tuple[str, int]] = []
    watch = PlacementWatch(
        file, 2, lambda new: seen.append(("prepare", new.stamp.n)), lambda new: seen.append(("adopted", new.stamp.n))
    )
    assert watch.current().table.stamp.n == 0
    file.write(PlacementTable.of(Stamp(1, 5), (WorkerEndpoint("a", "h:1", {1: (0, 1)}),)))
    assert watch.current().table.stamp.n == 0  # a dispatch reads no file
    assert watch.refresh().table.stamp.n == 5
    assert watch.current().routes.layer(1)[:-1].tolist() == [[0], [0]]
    watch.refresh()
    assert seen == [("prepare", 0), ("adopted", 0), ("prepare", 5), ("adopted", 5)]
