"""The cores of this process: claimed at start, applied to its threads, given up while others need them.

Import this before torch: OpenMP's runtime reads its environment when it is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import psutil

from cluster.errors import StartupError
from cluster.plan.cores import (
    ComputeProcess,
    CoreShare,
    HostCores,
    pick,
    pinned_share,
    too_few,
    unpinned_share,
)
from deployments.hosting.core_ledger import CoreLedger

_REVIEW_S = 1.0
# Turns of libgomp's waiting loop before a thread sleeps: its own default, about 3 ms, whatever the environment says. A
# shorter wait costs more than none. The same for Intel's runtime, in ms.
_SPIN_TURNS, _SPIN_MS = 300_000, 3

logger = logging.getLogger(__name__)


class ProcessCores:
    """What one compute process may use, kept in agreement with the other processes of its host.

    A process that found no cores looks again every second, and takes them when a predecessor has gone. One that has
    cores of its own, but beside which an unpinned one computes, runs unpinned itself for as long: pinned, it could not
    make way. With `pin_cores: always` it stays.
    """

    def __init__(
        self,
        process: ComputeProcess,
        host: HostCores,
        folder: Path,
        planned: Sequence[CoreShare] | None = None,
        pids: Callable[[], Iterable[int]] = lambda: (os.getpid(),),
    ) -> None:
        """`folder`: of the ledger, the same for all processes of the host. `planned`: of all compute processes of this
        host, this one included, if they are known. `pids`: the processes whose threads compute.

        Raises StartupError if the process is to be pinned whatever comes and cannot be.
        """
        self._process, self._host, self._pids = process, host, pids
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._moved = False  # whether affinities were ever set
        self._ledger: CoreLedger | None = None
        self._spin = False
        self._claimable: Sequence[int] = host.divisible
        self._planned: list[tuple[int, ...]] = []  # its own, and those of processes that differ in their number alone
        own = next((share for share in planned or () if share.name == process.name), None)
        if planned is None or own is None:
            # Nobody knows who else will come (or this one came later than planned): waiting threads sleep.
            self._wanted = process.pin != "never" and process.threads is not None
        else:
            self._wanted, self._spin = own.pinned, own.spin
            pinned = [share for share in planned if share.pinned]
            self._claimable = [core for share in pinned for core in share.cores]  # the rest is for other processes
            role = process.name.rpartition("-")[0]
            alike = [share for share in pinned if share.name.rpartition("-")[0] == role]
            self._planned = [share.cores for share in sorted(alike, key=lambda share: share.name != process.name)]
        try:
            self._ledger = CoreLedger(folder)
        except OSError as error:
            logger.warning("cores cannot be claimed in %s (%s): this process runs unpinned", folder, error)
        self.share = unpinned_share(host, process)
        self._claim()
        self._spin = self.share.spin  # OpenMP reads it once
        if process.pin == "always" and not self.share.pinned:
            self.close()
            raise StartupError(too_few(process, len(host.cores)))

    def environment(self) -> dict[str, str]:
        """OpenMP's environment for this process, to be set before torch is loaded."""
        return {"OMP_NUM_THREADS": str(self.share.threads), **waiting_environment(self.share.spin)}

    def start(self) -> None:
        """Put the threads on their cores, say so, and go on looking after it in a thread of its own."""
        self._apply()
        logger.info("%s", self.share)
        if self._wanted and not self.share.pinned:
            logger.info("there are not %s free cores: this process runs unpinned until there are", self.share.threads)
        if self._ledger is not None and self._wanted and self._process.pin == "auto":
            threading.Thread(target=self._watch, name="deepsplit-cores", daemon=True).start()

    def review(self) -> None:
        """Look at the ledger and follow it. The thread calls it every second."""
        with self._turn:
            ledger, before = self._ledger, self.share
            if ledger is None or self._process.pin == "always":
                return
            if not ledger.cores:
                self._claim()
            elif ledger.crowded():
                self.share = unpinned_share(self._host, self._process, self._spin)
            else:
                self.share = pinned_share(self._host, self._process, ledger.cores, self._spin)
            if self.share != before:
                self._apply()
                logger.info("%s", self.share)

    def close(self) -> None:
        """Give the cores up."""
        self._closed.set()
        with self._turn:
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None

    def _claim(self) -> None:
        if self._ledger is None:
            return
        cores = self._ledger.claim(self._claimable, self._choose) if self._wanted else None
        self._ledger.say_unpinned(cores is None)
        if cores is not None:
            self.share = pinned_share(self._host, self._process, cores, self._spin)

    def _choose(self, free: Collection[int]) -> tuple[int, ...] | None:
        threads = self._process.threads
        assert threads is not None, "wanted only with a number"
        as_planned = (cores for cores in self._planned if len(cores) == threads and set(cores) <= set(free))
        return next(as_planned, None) or pick(self._host, free, threads)

    def _apply(self) -> None:
        """Threads that are started later inherit it, as do child processes."""
        if set(self.share.cores) == os.sched_getaffinity(0) and not self._moved:
            return
        self._moved = True
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread.name), self.share.cores)

    def _watch(self) -> None:
        while not self._closed.wait(_REVIEW_S):
            try:
                self.review()
            except OSError as error:  # the folder is gone, as when the cluster ends
                logger.warning("the claims of cores cannot be read any more (%s): this process stays as it is", error)
                return


def child_pids() -> list[int]:
    """The processes that this one started, and theirs."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


def cores_folder() -> Path:
    """The folder in which the processes of this cluster on this host claim cores. In a Ray process only."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path()).parent / "cores"


def waiting_environment(spin: bool) -> dict[str, str]:
    """What OpenMP's threads do while they wait: sleep, or spin for a moment before."""
    if not spin:
        return {"OMP_WAIT_POLICY": "PASSIVE"}
    return {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": str(_SPIN_TURNS), "KMP_BLOCKTIME": str(_SPIN_MS)}
