"""The wait at the expert workers, from replies to the number that the Serve replica reads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from routing.tokens.plane_state import ExpertPlaneFile, ExpertPlaneState, StepQueueTime
from tests.unit.routing.tokens.conftest import Cluster, rows


def add_steps(queue: StepQueueTime, layers: dict[int, float], now_s: float, count: int = 1) -> float:
    for _ in range(count):
        for layer, queue_s in layers.items():
            queue.add(layer, queue_s, now_s)
        now_s += 0.1
    return now_s


def test_a_step_is_the_sum_over_its_layers_once_it_is_over() -> None:
    queue = StepQueueTime()
    add_steps(queue, {3: 0.1, 4: 0.2, 5: 0.3}, 100.0)
    assert (queue.steps, queue.mean_s) == (0, 0.0)
    queue.add(3, 7.0, 100.1)
    assert queue.steps == 1
    assert queue.mean_s == pytest.approx(0.6)


def test_steps_of_different_depth_begin_at_the_first_layer() -> None:
    queue = StepQueueTime()
    for layer in (60, 61, 3, 4, 60, 61, 61, 61, 3):  # MTP layers come again, for each drafted token
        queue.add(layer, 1.0, 100.0)
    assert queue.steps == 1
    assert queue.mean_s == pytest.approx(8.0)  # the first two were taken for a part of it


def test_newer_steps_count_more_and_old_ones_fade() -> None:
    queue = StepQueueTime()
    now_s = add_steps(queue, {1: 1.0}, 100.0, count=50)
    assert queue.mean_s == pytest.approx(1.0)
    now_s = add_steps(queue, {1: 0.0}, now_s, count=5)
    assert 0.3 < queue.mean_s < 0.9
    add_steps(queue, {1: 0.0}, now_s, count=50)
    assert queue.mean_s < 0.01


def test_a_number_that_nobody_renews_is_nought(tmp_path: Path) -> None:
    file = ExpertPlaneFile(tmp_path / "expert_plane")
    assert file.read(time.time()) == ExpertPlaneState()
    file.write(ExpertPlaneState(0.0123, degraded=True))
    os.utime(file.path, (1000.0, 1000.0))
    assert file.read(1001.9) == ExpertPlaneState(0.0123, degraded=True)
    assert file.read(1002.1) == ExpertPlaneState()
    file.write(ExpertPlaneState(4.5))
    assert ExpertPlaneFile(file.path).read(file.path.stat().st_mtime) == ExpertPlaneState(4.5)
    assert [path.name for path in tmp_path.iterdir()] == ["expert_plane"]


def test_a_client_beside_a_busy_one_reports_its_wait(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("a", list(range(8)), delay_s=0.05)
    cluster.publish("a")
    file = ExpertPlaneFile(tmp_path / "expert_plane")
    alone, beside = cluster.client(plane_file=file), cluster.client()
    hidden, ids, weights, _ = rows(1)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            beside.forward(2, hidden, ids, weights)

    def waits() -> list[float]:
        seen = []
        for _ in range(40):
            for layer in (1, 2):
                alone.forward(layer, hidden, ids, weights)
            seen.append(file.read(time.time()).queue_s)
        return seen[20:]

    idle = waits()
    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        busy = waits()
    finally:
        stop.set()
        thread.join()
    # Nearly every request finds the other's being computed (50 ms), and a step has two layers.
    assert max(idle) < 0.02 < max(busy) < 0.5
