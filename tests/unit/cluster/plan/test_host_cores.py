"""Reading cores from what Linux says, written by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.plan.cores import Core
from cluster.plan.host_cores import read_host, this_host


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_two_sockets_with_siblings_and_a_core_that_is_offline(tmp_path: Path) -> None:
    cpu, node = "sys/devices/system/cpu", "sys/devices/system/node"
    siblings = {n: f"{n % 4},{n % 4 + 4}" for n in range(8)}
    write(tmp_path, {f"{cpu}/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()})
    write(tmp_path, {f"{node}/node0/cpulist": "0-1,4-5", f"{node}/node1/cpulist": "2-3,6-7", f"{cpu}/online": "0-6"})
    host = read_host({1, 2, 5, 6, 7}, tmp_path)
    assert host.cores == (Core(1, 1, 0), Core(2, 2, 1), Core(5, 1, 0), Core(6, 2, 1))
    assert host.quota is None


def test_a_host_that_tells_nothing(tmp_path: Path) -> None:
    assert read_host({0, 3}, tmp_path).cores == (Core(0, 0, 0), Core(3, 3, 0))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4.0),
        # The smallest of a group and those above it.
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 1000",
          "sys/fs/cgroup/a/cpu.max": "3000 1000"}, 3.0),
        ({"proc/self/cgroup": "3:cpuacct,cpu:/a", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "2000",
          "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "1000"}, 2.0),
    ],
)  # fmt: skip
def test_quotas(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert read_host({0}, write(tmp_path, files)).quota == quota


KEEP_TO_THE_LAST = """
import os, subprocess, sys
from cluster.plan.host_cores import keep_to, this_host
keep_to(this_host().all[-1:])
ask = "import os; from cluster.plan.host_cores import this_host as host; "
ask += "print(sorted(os.sched_getaffinity(0)), host().all)"
subprocess.run([sys.executable, "-c", ask], check=True)
"""


def test_processes_that_are_kept_to_some_cores_know_of_all() -> None:
    done = subprocess.run([sys.executable, "-c", KEEP_TO_THE_LAST], capture_output=True, text=True, timeout=60)
    cores = sorted(os.sched_getaffinity(0))
    assert done.stdout.strip() == f"{cores[-1:]} {tuple(cores)}", done.stderr


def test_this_host_has_the_cores_that_we_may_use() -> None:
    assert set(this_host().all) == os.sched_getaffinity(0)
