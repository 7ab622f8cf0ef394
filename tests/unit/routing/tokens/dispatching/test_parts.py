"""The client's parts that need no worker: the watchdog, the placement watch."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from routing.tokens.dispatching.placement_watch import PlacementWatch
from routing.tokens.dispatching.watchdog import Watchdog
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint


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
