"""The process that owns a running cluster: starts the driver, passes its stages on, and ends everything, come what may.

It imports neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.errors import StartupError
from cluster.launch.driver import Event, Job
from cluster.launch.driver_process import as_error, log_tail, make_root, read_events, start_driver, token_path
from cluster.launch.processes import adopt_orphans, end_all
from cluster.launch.progress import Stages
from cluster.launch.state import ClusterState, StateFolder
from cluster.plan.local_node import node_labels, node_resources

_TICK_S = 0.2


@dataclass(frozen=True)
class Task:
    """What to start."""

    config: str  # Config as JSON
    builder: str  # import string of the application's builder
    leave: bool  # joined cluster, detached: leave the application there and end


class Stopped(Exception):
    """SIGINT, SIGTERM or SIGHUP asked for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Signals:
    """Turns stop signals into a flag, so that no exception strikes between a fork and the note of its pid."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def install(self) -> None:
        """From here on signals are only noted."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, lambda received, _frame: self.received.append(received))

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.received:
            raise Stopped(self.received[0])


class Supervisor:
    """One cluster from start to end. The caller holds the state folder's lock."""

    def __init__(self, task: Task, folder: StateFolder, signals: Signals, stages: Stages) -> None:
        self._task = task
        self._config = Config.model_validate_json(task.config)
        self._folder = folder
        self._signals = signals
        self._stages = stages
        me = psutil.Process()
        joined = self._config.ray.address is not None
        self._state = ClusterState(me.pid, me.create_time(), str(make_root()), 0, "", joined, False, task.config)
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self, on_ready: Callable[[ClusterState], None]) -> None:
        """Start, call `on_ready`, and stay until stopped. Everything that was started is gone when this returns.

        Raises Stopped on a signal, and the error of a start that failed.
        """
        adopt_orphans()
        try:
            self._folder.write(self._state)
            self._start()
            on_ready(self._state)
            if self._task.leave:
                return
            self._stay()
        finally:
            self._end()

    # --- start ---

    def _start(self) -> None:
        self._signals.check()
        events, child_end = os.pipe()
        ray = self._config.ray
        local = ray.address is None
        job = Job(
            action="serve",
            config=self._task.config,
            address=ray.address or "",
            root=self._state.root,
            events_fd=child_end,
            builder=self._task.builder,
            resources=node_resources(self._config) if local else {},
            labels=node_labels(self._config) if local else {},
        )
        root = Path(self._state.root)
        if local:
            token_path(root).write_text(secrets.token_hex(32))
            token_path(root).chmod(0o600)
        self._driver = start_driver(job, token_path(root) if local else None)
        os.close(child_end)
        self._state = replace(self._state, session=self._driver.pid)
        self._folder.write(self._state)
        deadline = time.monotonic() + ray.start_timeout_s
        for event in read_events(events, self._driver):
            self._signals.check()
            if event is None:
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"not ready within {ray.start_timeout_s:g} s (ray.start_timeout_s): the last stage above is "
                        f"what it waited for"
                    )
                continue
            if event.kind == "ready":
                self._state = replace(self._state, ready=True)
                self._folder.write(self._state)
                return
            self._take(event)
        raise StartupError(f"the driver ended early:\n{log_tail(Path(self._state.root))}")

    def _take(self, event: Event) -> None:
        if event.kind == "address":
            self._state = replace(self._state, address=event.text)
            self._folder.write(self._state)
        elif event.kind == "failed":
            raise as_error(event)
        else:
            self._stages.say(event.text)

    def _stay(self) -> None:
        assert self._driver is not None
        while self._driver.poll() is None:
            self._signals.check()
            time.sleep(_TICK_S)
        self._signals.check()
        raise StartupError(f"Ray ended unexpectedly:\n{log_tail(Path(self._state.root))}")

    # --- end ---

    def _end(self) -> None:
        """Polite while there is something to drain, then by force; a second signal skips the politeness."""
        root = Path(self._state.root)
        if self._driver is not None:
            if not (self._state.ready and self._task.leave):
                grace_s = self._config.gateway.drain_timeout_s
                again = f"; running requests have {grace_s:g} s, a second signal ends them" if self._state.ready else ""
                self._stages.say(f"stopping{again}")
            if self._state.ready and self._task.leave:
                self._driver.kill()
            elif self._driver.poll() is None and self._state.address and (self._state.ready or self._state.joined):
                self._ask_to_stop(self._driver)
            # On a joined cluster only the driver is a member; the cluster's own processes are none of ours.
            end_all(root, self._state.session, grace_s=0, descendants=True)
        shutil.rmtree(root, ignore_errors=True)
        if self._state.ready and self._task.leave:
            self._folder.write(replace(self._state, supervisor=0, root="", session=0))
            self._folder.unlock()
        else:
            self._folder.clear()

    def _ask_to_stop(self, driver: subprocess.Popen[bytes]) -> None:
        assert driver.stdin is not None
        with contextlib.suppress(OSError):
            driver.stdin.write(b"stop\n")
            driver.stdin.flush()
        signals_so_far = len(self._signals.received)
        deadline = time.monotonic() + self._config.stop_within_s
        while driver.poll() is None and time.monotonic() < deadline:
            if len(self._signals.received) > max(1, signals_so_far):
                return
            time.sleep(0.05)
