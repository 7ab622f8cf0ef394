"""Finds and ends every process of a cluster, whatever has become of its parents. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# Inherited by every process of a cluster; its value is the cluster's root folder, which no two clusters share.
MARK = "DEEPSPLIT_CLUSTER"

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies, so that none escapes `end_all`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def members(root: Path, session: int | None, descendants: bool) -> list[psutil.Process]:
    """Live processes of the cluster with root folder `root`, this one excepted.

    They are the members of the driver's Unix session `session`, and whatever carries the mark in its environment or the
    root folder in its command line. (No one sign is enough: Ray's agents overwrite their environment with a title, and
    a process may open a session of its own.) With `descendants`, all of this process's descendants count too.
    """
    me = os.getpid()
    mine = {child.pid for child in psutil.Process().children(recursive=True)} if descendants else set()
    return [
        process
        for process in psutil.process_iter()
        if process.pid != me
        and _alive(process)
        and (process.pid in mine or (_own(process) and _belongs(process, str(root), session)))
    ]


def end_all(root: Path, session: int | None, grace_s: float, descendants: bool = False) -> list[int]:
    """Wait up to `grace_s` for the members to end by themselves, then kill. Returns the pids that had to be killed."""
    killed: set[int] = set()
    deadline = time.monotonic() + grace_s
    while True:
        if descendants:
            _reap()
        left = members(root, session, descendants)
        if not left:
            return sorted(killed)
        if time.monotonic() >= deadline:
            # Again and again: a process may have started a child between the listing and the kill.
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    killed.add(process.pid)
        time.sleep(0.05)


def _belongs(process: psutil.Process, root: str, session: int | None) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        if session is not None and os.getsid(process.pid) == session:
            return True
        return process.environ().get(MARK) == root or any(root in word for word in process.cmdline())
    return False


def _own(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.uids().real == os.getuid())
    return False


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _reap() -> None:
    """Collect the dead among adopted children."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def listeners(port: int) -> Iterator[psutil.Process]:
    """Processes that listen on TCP `port`, as far as this user may see them."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                with contextlib.suppress(psutil.Error):
                    yield psutil.Process(connection.pid)
