"""Starts `cluster.launch.driver` as a child process and reads what it reports. Imports neither Ray nor torch."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cluster import errors
from cluster.errors import DeepsplitError, StartupError
from cluster.launch.driver import Event, Job
from cluster.launch.processes import MARK

# Unix socket paths are at most 107 characters, and Ray's take 66 below the root.
_LONGEST_ROOT = 40
_TICK_S = 0.2


def make_root() -> Path:
    """A new folder, only for this user, with a path that is short enough for Ray's sockets."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="deepsplit-", dir=parent if len(parent) <= _LONGEST_ROOT - 19 else "/tmp"))


def token_path(root: Path) -> Path:
    """Where a local cluster keeps the token without which Ray answers nobody."""
    return root / "auth_token"


def start_driver(job: Job, token: Path | None) -> subprocess.Popen[bytes]:
    """Start the driver in a Unix session of its own (the terminal's Ctrl-C is not for it); its log is in the root.

    `token` belongs to a local cluster of ours; None on a joined one, whose own rules then hold.
    """
    root = Path(job.root)
    env = dict(os.environ)
    env |= {
        MARK: job.root,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # Ray's default of 15 starves the model whenever anything else runs on the host
    }
    if token is not None:
        scratch = root / "t"
        scratch.mkdir(exist_ok=True)
        # Whatever a process leaves behind goes away with the root.
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "TMPDIR": str(scratch)}
        env.pop("RAY_ADDRESS", None)
    with (root / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "cluster.launch.driver"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            pass_fds=[job.events_fd],
            start_new_session=True,
        )
    assert driver.stdin is not None
    driver.stdin.write((json.dumps(asdict(job)) + "\n").encode())
    driver.stdin.flush()
    return driver


def read_events(events: int, driver: subprocess.Popen[bytes]) -> Iterator[Event | None]:
    """The driver's events until it ends; None at least every `_TICK_S`."""
    pending = b""
    with open(events, "rb", buffering=0) as stream:  # a descriptor, not a path
        while True:
            readable, _, _ = select.select([stream], [], [], _TICK_S)
            if readable:
                chunk = stream.read(65536)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    yield Event(**json.loads(line))
                if not chunk:
                    return
            elif driver.poll() is not None:
                return
            yield None


def as_error(event: Event) -> DeepsplitError:
    """The error that a "failed" event describes."""
    kind = getattr(errors, event.error, StartupError)
    assert issubclass(kind, DeepsplitError)
    return kind(event.text)


def log_tail(root: Path) -> str:
    """The last 20 lines of the driver's log."""
    try:
        return "\n".join((root / "driver.log").read_text(errors="replace").splitlines()[-20:])
    except OSError:
        return "(it left no log)"
