"""What `benchmarks.failover` does to a cluster's processes. Each fault is a function that returns when it is over, or
when only the cluster's own remedy is missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.application import Application

_SLOW_S, _SLOW_RUNS_S, _SLOW_STOPS_S = 8.0, 0.001, 0.019
_CUT_S = 8.0
_MOVED_S = 60.0  # the longest wait for the balancer
_INJECTED = Path(__file__).parent / "injected"

Worker = Mapping[str, Any]  # as `deepsplit status --json` has it


@dataclass(frozen=True)
class Fault:
    """`happen(app, worker)` blocks. `replaces`: Serve starts another process in the worker's place."""

    happen: Callable[[Application, Worker], None]
    replaces: bool = False


def environment(folder: Path) -> dict[str, str]:
    """What a cluster needs in its environment for `fail` and `hang`; `folder`: an empty one of its own."""
    paths = [str(_INJECTED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "BENCHMARK_FAULTS": str(folder)}


def impossible() -> dict[str, str]:
    """Faults that cannot be made on this machine, and why."""
    return {} if os.geteuid() == 0 and shutil.which("iptables") else {"cut": "it needs root and iptables"}


@contextmanager
def slowed(pid: int, runs_s: float, stops_s: float) -> Iterator[None]:
    """The process runs for `runs_s`, stops for `stops_s`, and so on."""
    done = threading.Event()

    def throttle() -> None:
        while not done.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(stops_s)
            os.kill(pid, signal.SIGCONT)
            time.sleep(runs_s)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _kill(app: Application, worker: Worker) -> None:
    os.kill(worker["pid"], signal.SIGKILL)


def _stop(app: Application, worker: Worker) -> None:
    os.kill(worker["pid"], signal.SIGSTOP)


def _slow(app: Application, worker: Worker) -> None:
    with slowed(worker["pid"], _SLOW_RUNS_S, _SLOW_STOPS_S):
        time.sleep(_SLOW_S)


def _cut(app: Application, worker: Worker) -> None:
    port = worker["address"].rpartition(":")[2]
    rules = [["INPUT", "-p", "tcp", end, port, "-j", "DROP"] for end in ("--dport", "--sport")]
    try:
        for rule in rules:
            subprocess.run(["iptables", "-I", *rule], check=True)
        time.sleep(_CUT_S)
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-D", *rule], check=False)


def _fail(app: Application, worker: Worker) -> None:
    (Path(app.environment["BENCHMARK_FAULTS"]) / str(worker["pid"])).write_text("fail")


def _hang(app: Application, worker: Worker) -> None:
    (Path(app.environment["BENCHMARK_FAULTS"]) / str(worker["pid"])).write_text("hang")


def _directory(app: Application, worker: Worker) -> None:
    os.kill(app.directory(), signal.SIGKILL)


def _both(app: Application, worker: Worker) -> None:
    _directory(app, worker)
    _kill(app, worker)


def _scale(app: Application, worker: Worker) -> None:
    workers = len(app.ready())
    app.scale(workers + 2)
    app.scale(workers)


def _restart(app: Application, worker: Worker) -> None:
    app.restart()


def _rebalance(app: Application, worker: Worker) -> None:
    """The worker runs a third of the time until the balancer has moved experts."""
    before, until_s = app.status()["rebalanced"], time.monotonic() + _MOVED_S
    with slowed(worker["pid"], 0.001, 0.002):
        while app.status()["rebalanced"] == before and time.monotonic() < until_s:
            time.sleep(1)


FAULTS: Mapping[str, Fault] = {
    "kill": Fault(_kill, replaces=True),
    "stop": Fault(_stop, replaces=True),
    "slow": Fault(_slow),
    "cut": Fault(_cut),
    "fail": Fault(_fail, replaces=True),
    "hang": Fault(_hang, replaces=True),
    "directory": Fault(_directory),
    "both": Fault(_both, replaces=True),
    "rebalance": Fault(_rebalance),
    "scale": Fault(_scale),
    "restart": Fault(_restart),
}
