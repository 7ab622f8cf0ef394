"""Reads which cores there are: affinity, siblings and NUMA nodes from Linux, quotas from cgroups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set
from pathlib import Path

from cluster.plan.cores import Core, HostCores, ranges

# Set for all processes of a cluster whose own affinity is narrower than what compute processes may use.
_WHOLE_HOST = "DEEPSPLIT_HOST_CORES"


def this_host() -> HostCores:
    """The cores that compute processes started from here may use."""
    return read_host(_listed(os.environ.get(_WHOLE_HOST, "")) or os.sched_getaffinity(0))


def keep_to(light_cores: tuple[int, ...]) -> None:
    """Keep this thread, and all processes that it starts, to these cores, but let them know of the others."""
    os.environ[_WHOLE_HOST] = ranges(this_host().all)
    os.sched_setaffinity(0, light_cores)


def read_host(allowed: Set[int], root: Path = Path("/")) -> HostCores:
    """The cores with these numbers, as the files under `root` describe them. What is not told is taken as simple:
    no siblings, one NUMA node, no quota.
    """
    cpus, nodes = root / "sys/devices/system/cpu", root / "sys/devices/system/node"
    node_of: dict[int, int] = {}
    for folder in nodes.glob("node[0-9]*"):
        node_of |= dict.fromkeys(_numbers(folder / "cpulist"), int(folder.name.removeprefix("node")))
    online = _numbers(cpus / "online") or allowed
    cores = []
    for number in sorted(allowed & online or allowed):
        siblings = _numbers(cpus / f"cpu{number}/topology/thread_siblings_list")
        cores.append(Core(number, min(siblings | {number}), node_of.get(number, 0)))
    return HostCores(tuple(cores), _quota(root))


def _quota(root: Path) -> float | None:
    """The smallest CPU limit of this process's control group and those above it, in cores."""
    quotas = []
    for folder in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # version 2: "max 100000" or "400000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):  # version 1: -1 is no limit
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                quotas.append(quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


def _groups(root: Path) -> list[Path]:
    found = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/cpu"]  # inside a container, the container's own
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                own = Path(path.lstrip("/"))
                mounted = found[0] if controllers == "" else found[1]
                found += [mounted / own, *(mounted / parent for parent in own.parents)]
    return found


def _numbers(path: Path) -> set[int]:
    """The numbers in a list such as `0-3,8`; none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return _listed(path.read_text().strip())
    return set()


def _listed(text: str) -> set[int]:
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
