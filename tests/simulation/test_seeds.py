"""Some hundred seeds, in a process of their own: the order of sets must be the same in each run."""

from __future__ import annotations

import re
import subprocess
import sys

SEEDS = 120
# What must have happened in so many seeds, or the faults of the simulation have become harmless.
EXPECTED = {
    "worker_lost", "worker_silent", "worker_late", "worker_busy", "worker_failing", "uncovered wait", "degraded",
    "takeover", "hand-over", "move", "drop", "kill", "stop", "cut", "lossy", "jump", "lose_directory",
    "two_directories", "resize",
}  # fmt: skip


def test_every_row_is_summed_once_whatever_happens() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    said = done.stdout.split("happened: ")[1].strip().split(", ")
    happened = {name for name, _, count in (one.rpartition(" ") for one in said) if int(count) > 0}
    assert happened >= EXPECTED


def test_a_seed_repeats_itself() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "2", "--from", "7"]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=300, check=True) for _ in range(2)]
    first, second = (re.sub(r"[\d.]+ s;", "", done.stdout) for done in runs)
    assert first == second
