"""Real processes that share a host: who gets cores, what a killed one leaves, who makes way.

This machine may have two cores: hosts with two to divide have a made-up first one, which is nobody's anyway.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import StartupError
from cluster.plan.cores import ComputeProcess, Core, HostCores
from deployments.hosting import core_ledger
from deployments.hosting.process_cores import ProcessCores

_REPOSITORY = Path(__file__).resolve().parents[4]
MINE = sorted(os.sched_getaffinity(0))
ONE = f"{MINE[-1] if len(MINE) > 1 else 999},{MINE[0]}"
TWO = f"999,{MINE[0]},{MINE[1]}" if len(MINE) > 1 else ""
needs_two = pytest.mark.skipif(not TWO, reason="needs two cores")


class Claimer:
    """One such process, with its answers."""

    def __init__(self, folder: Path, cores: str, threads: int = 1, pin: str = "auto", known: str = "") -> None:
        arguments = [str(folder), str(threads), pin, cores, *([known] if known else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.deployments.hosting.core_process", *arguments],
            cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said: dict[str, Any] = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        self.said = self._answer()
        return self.said

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def log(self) -> str:
        """Ends the process."""
        return self.process.communicate(timeout=10)[1]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        answer: dict[str, Any] = json.loads(line)
        return answer


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Claimer] = []

    def claimer(*args: Any, **kwargs: Any) -> Claimer:
        started.append(Claimer(tmp_path / "cores", *args, **kwargs))
        return started[-1]

    yield claimer
    for one in started:
        if one.process.poll() is None:
            one.kill()


@needs_two
def test_two_processes_have_different_cores_and_a_killed_ones_are_free(start: Any) -> None:
    first, second = start(TWO), start(TWO)
    assert first.said["cores"] == [MINE[0]]
    assert second.said["cores"] == [MINE[1]]
    for one in (first, second):
        # Threads from before, those that load, and processes that it starts: memory comes from these cores' NUMA node.
        assert one.said["threads"] == [one.said["cores"]]
        assert one.ask("child")["child"] == str(one.said["cores"])
        assert one.said["environment"] == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    assert os.sched_getaffinity(first.process.pid) == {MINE[0]}
    first.kill()
    assert start(TWO).said["cores"] == [MINE[0]]


def test_without_free_cores_all_run_unpinned_until_there_are_some(start: Any) -> None:
    first = start(ONE)
    assert first.said["pinned"]
    second = start(ONE)
    assert not second.said["pinned"]
    assert second.said["threads"] == [MINE]
    assert not first.ask("review")["pinned"]  # makes way
    assert set(first.said["threads"][0]) >= {MINE[0]}
    second.kill()
    assert first.ask("review")["pinned"]
    assert first.said["threads"] == [[MINE[0]]]
    third = start(ONE)
    first.kill()
    assert third.ask("review")["pinned"]
    assert third.said["threads"] == [[MINE[0]]]
    assert "there are not 1 free cores: this process runs unpinned until there are" in third.log()


def test_cores_that_are_given_up_are_free(start: Any) -> None:
    start(ONE).ask("close")
    assert start(ONE).said["pinned"]


@needs_two
def test_processes_that_differ_in_their_number_alone_share_out_what_is_planned_for_them(start: Any) -> None:
    wide = f"{TWO},998"  # the last one is nobody's by plan, so it is left to processes that do not compute
    assert [start(wide, known="1,1").said["cores"] for _ in range(2)] == [[MINE[0]], [MINE[1]]]
    assert not start(wide, known="1,1").said["pinned"]


def test_threads_spin_briefly_only_if_all_processes_are_known_and_fit(start: Any) -> None:
    known = start(ONE, known="1")
    assert known.said["environment"]["OMP_WAIT_POLICY"] == "ACTIVE"
    assert int(known.said["environment"]["GOMP_SPINCOUNT"]) > 0
    assert known.said["text"].endswith("1 thread, pinned, waiting threads spin briefly")
    known.kill()
    crowd = start(ONE, known="1,1")  # this one would find a core, but the next one would not
    assert not crowd.said["pinned"]
    assert crowd.said["threads"] == [MINE]
    assert crowd.said["environment"] == {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_always_stays_pinned_beside_others(start: Any) -> None:
    first, second = start(ONE, pin="always"), start(ONE, pin="never")
    assert not second.said["pinned"]
    assert first.ask("review")["pinned"]


def host() -> HostCores:
    return HostCores((Core(999, 999, 0), Core(MINE[0], MINE[0], 0)))


def test_always_without_a_core_does_not_start(start: Any, tmp_path: Path) -> None:
    start(ONE)
    with pytest.raises(StartupError, match=r"p: pin_cores is always, but 1 core.*set pin_cores: auto"):
        ProcessCores(ComputeProcess("p", 1, "always"), host(), tmp_path / "cores")


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cores = ProcessCores(ComputeProcess("p", 1), host(), tmp_path / "file" / "cores")
    assert not cores.share.pinned
    assert "cores cannot be claimed in" in caplog.text
    cores.review()  # nothing to look at
    cores.close()


def test_a_ledger_whose_turn_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core_ledger, "_TURN_TIMEOUT_S", 0.05)
    (tmp_path / "turn").touch()
    with (tmp_path / "turn").open() as stopped, caplog.at_level(logging.INFO):
        fcntl.flock(stopped, fcntl.LOCK_EX)
        cores = ProcessCores(ComputeProcess("p", 1), host(), tmp_path)
        assert not cores.share.pinned
        cores.close()
