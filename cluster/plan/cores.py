"""Which cores of a host each compute process gets. Pure: hosts and processes come in as data.

A *core* here is what Linux numbers as a CPU: one hardware thread. Cores with the same `physical` are siblings of one
physical core, and two threads on them share its arithmetic.

The rule is all or nothing: where a host has a core for each compute thread and one for everything else (gateway,
directory, Ray), every process gets cores of its own and is pinned to them. Where it has not, nobody is pinned and
waiting threads sleep: on two shared cores pinning changed nothing, and a thread that spins takes a core from one that
has work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.config import PinCores
from cluster.errors import PlanError

LIGHT_CORES = 1  # of each host, for the processes that do not compute


@dataclass(frozen=True)
class Core:
    """One hardware thread."""

    number: int  # Linux's
    physical: int  # number of the first sibling
    numa_node: int


@dataclass(frozen=True)
class HostCores:
    """The cores that processes of this host (or container) may use."""

    cores: tuple[Core, ...]  # by number
    quota: float | None = None  # cores' worth of time that a cgroup allows; None: no limit

    @property
    def all(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(core.number for core in self.cores)

    @property
    def exclusive(self) -> bool:
        """Whether they may be divided. Under a quota below their number they are shared with other containers."""
        return self.quota is None or self.quota >= len(self.cores)

    @property
    def worth(self) -> int:
        """How many threads can run at once: the cores, or the whole ones of a quota."""
        return len(self.cores) if self.quota is None else max(1, min(len(self.cores), int(self.quota)))

    @property
    def divisible(self) -> tuple[int, ...]:
        """The cores that compute processes may get for themselves: all but the first, or none."""
        return self.all[LIGHT_CORES:] if self.exclusive else ()

    def nodes_of(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """NUMA nodes of these cores."""
        chosen = set(numbers)
        return tuple(sorted({core.numa_node for core in self.cores if core.number in chosen}))


@dataclass(frozen=True)
class ComputeProcess:
    """One process with compute threads, as the configuration wants it."""

    name: str
    threads: int | None  # None: as many as can run at once
    pin: PinCores = "auto"


@dataclass(frozen=True)
class CoreShare:
    """What one process gets."""

    name: str
    cores: tuple[int, ...]  # its own if pinned, else all that it may use
    numa_nodes: tuple[int, ...]
    threads: int
    pinned: bool
    spin: bool  # threads that wait may spin for a moment before they sleep

    def __str__(self) -> str:
        nodes = f"NUMA node{'s' * (len(self.numa_nodes) > 1)} {ranges(self.numa_nodes)}"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        waiting = "spin briefly" if self.spin else "sleep"
        pinned = "pinned" if self.pinned else "not pinned"
        where = f"core{'s' * (len(self.cores) > 1)} {ranges(self.cores)} of {nodes}"
        return f"{where}, {threads}, {pinned}, waiting threads {waiting}"


def assign(host: HostCores, processes: Sequence[ComputeProcess], may_spin: bool = True) -> tuple[CoreShare, ...]:
    """Cores for all compute processes of a host, in their order. They spin only if `may_spin`, and if each thread has a
    physical core to itself.

    Raises PlanError where a process is to be pinned whatever comes (`pin` is "always") and has no cores left.
    """
    pinned = {process.name for process in processes if _is_pinned(host, processes, process)}
    may_spin = may_spin and len(pinned) == len(processes) and _own_physical_cores(host, processes)
    free, shares = list(host.divisible), {}
    for process in sorted(processes, key=lambda one: -(one.threads or 0)):  # large ones find whole NUMA nodes
        if process.name not in pinned:
            continue
        assert process.threads is not None
        cores = pick(host, free, process.threads)
        if cores is None:
            raise PlanError(too_few(process, len(host.cores)))
        free = [number for number in free if number not in cores]
        shares[process.name] = pinned_share(host, process, cores, may_spin)
    return tuple(shares.get(process.name) or unpinned_share(host, process) for process in processes)


def pick(host: HostCores, free: Iterable[int], threads: int) -> tuple[int, ...] | None:
    """The best `threads` of the `free` cores for one process, None if there are fewer.

    Physical cores of which no sibling is taken come before siblings. One NUMA node is better than two: the smallest
    that has room, so that larger ones stay whole; several only if none has, those with most room first.
    """
    left = set(free)
    if len(left) < threads:
        return None
    cores = [core for core in host.cores if core.number in left]
    whole = [one for one in _first_siblings(cores) if _untouched(host, one, left)]
    for candidates in (whole, [*whole, *(core for core in cores if core not in whole)]):
        if len(candidates) >= threads:
            by_node = _by_node(candidates)
            fitting = [node for node in by_node if len(node) >= threads]
            largest_first = sorted(by_node, key=len, reverse=True)
            chosen = min(fitting, key=len) if fitting else [core for node in largest_first for core in node]
            return tuple(sorted(core.number for core in chosen[:threads]))
    raise AssertionError("all free cores are candidates")


def pinned_share(host: HostCores, process: ComputeProcess, cores: tuple[int, ...], spin: bool) -> CoreShare:
    """The share of a process that has `cores` for itself."""
    return CoreShare(process.name, cores, host.nodes_of(cores), len(cores), pinned=True, spin=spin)


def unpinned_share(host: HostCores, process: ComputeProcess, spin: bool = False) -> CoreShare:
    """The share of a process that runs where the kernel puts it."""
    threads = process.threads or host.worth
    return CoreShare(process.name, host.all, host.nodes_of(host.all), threads, pinned=False, spin=spin)


def too_few(process: ComputeProcess, cores: int) -> str:
    """Why a process that is to be pinned cannot be on a host of `cores`, and what to do."""
    return (
        f"{process.name}: pin_cores is always, but {process.threads} core(s) of its own are not to be had on a host of "
        f"{cores}: other processes have theirs, {LIGHT_CORES} stays with what does not compute, and cores under a CPU "
        f"quota are not divided; lower threads, or set pin_cores: auto"
    )


def regular_host(physical_cores: int, siblings: int = 1, numa_nodes: int = 1) -> HostCores:
    """A host with its cores evenly over its NUMA nodes, numbered as Linux does: all first siblings, then all second."""
    count = physical_cores * siblings
    return HostCores(
        tuple(Core(n, n % physical_cores, (n % physical_cores) * numa_nodes // physical_cores) for n in range(count))
    )


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers as Linux writes them: `0-3,8`."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        first, *others = (number for _, number in run)
        parts.append(f"{first}-{others[-1]}" if others else str(first))
    return ",".join(parts)


def _is_pinned(host: HostCores, processes: Sequence[ComputeProcess], process: ComputeProcess) -> bool:
    if process.pin != "auto":
        return process.pin == "always"
    wanted = [one.threads for one in processes]
    if None in wanted or any(one.pin == "never" for one in processes):
        return False
    return sum(threads or 0 for threads in wanted) <= len(host.divisible)


def _own_physical_cores(host: HostCores, processes: Sequence[ComputeProcess]) -> bool:
    """Whether no thread has to share a physical core with another process."""
    whole = {core.physical for core in host.cores} - {core.physical for core in host.cores[:LIGHT_CORES]}
    return sum(process.threads or 0 for process in processes) <= len(whole)


def _untouched(host: HostCores, core: Core, free: set[int]) -> bool:
    return all(one.number in free for one in host.cores if one.physical == core.physical)


def _first_siblings(cores: Sequence[Core]) -> list[Core]:
    return list({core.physical: core for core in reversed(cores)}.values())[::-1]


def _by_node(cores: Sequence[Core]) -> list[list[Core]]:
    nodes = sorted({core.numa_node for core in cores})
    return [[core for core in cores if core.numa_node == node] for node in nodes]
