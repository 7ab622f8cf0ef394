"""Samples that are put into metrics later: all of them, once each."""

from __future__ import annotations

import threading
import time

from monitoring.deferred import Deferred


def test_every_sample_arrives_once_whoever_folds() -> None:
    seen: list[int] = []
    deferred: Deferred[int] = Deferred(seen.extend)
    folding = [threading.Thread(target=lambda: [deferred.fold() for _ in range(2000)]) for _ in range(2)]
    for thread in folding:
        thread.start()
    for number in range(20_000):
        deferred.record(number)
    for thread in folding:
        thread.join()
    deferred.close()
    assert seen == list(range(20_000))


def test_samples_arrive_by_themselves() -> None:
    seen: list[int] = []
    deferred: Deferred[int] = Deferred(seen.extend)
    deferred.record(1)
    deadline = time.monotonic() + 10
    while not seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    deferred.close()
