"""`deepsplit up` and `down`: one cluster per user, in the foreground or detached."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cluster.config import Config
from cluster.errors import DeepsplitError, StartupError
from cluster.launch.preflight import check_ports, check_versions
from cluster.launch.processes import end_all
from cluster.launch.progress import Stages
from cluster.launch.running import ask
from cluster.launch.state import ClusterState, StateFolder
from cluster.launch.supervisor import Signals, Stopped, Supervisor, Task

BUILDER = "deployments.app:build"
_TICK_S = 0.1


def up(config: Config, folder: StateFolder, on_ready: Callable[[ClusterState], None], builder: str = BUILDER) -> None:
    """Start a cluster, call `on_ready`, and stay until a signal comes. Nothing is left behind.

    Raises StartupError (already running, port in use, a process that could not start), whatever error of the tree a
    deployment failed with, and Stopped on SIGINT, SIGTERM or SIGHUP.
    """
    signals = Signals()
    signals.install()
    stages = Stages(sys.stderr, time.monotonic)
    _claim(config, folder)
    stages.say("environment checked")
    Supervisor(Task(config.model_dump_json(), builder, leave=False), folder, signals, stages).run(on_ready)


def up_detached(
    config: Config, folder: StateFolder, on_ready: Callable[[ClusterState], None], builder: str = BUILDER
) -> None:
    """Like `up`, but in a process of its own that outlives this one; returns when the cluster is ready."""
    _claim(config, folder)
    folder.unlock()  # the supervisor takes it; whoever slips in between gets it instead, and we their refusal
    signals = Signals()
    signals.install()
    task = Task(config.model_dump_json(), builder, leave=config.ray.address is not None)
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "cluster.launch.launcher", str(write_end), str(folder.folder)],
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=write_end,
        pass_fds=[write_end],
        start_new_session=True,
    )
    os.close(write_end)
    assert child.stdin is not None
    child.stdin.write((json.dumps(asdict(task)) + "\n").encode())
    child.stdin.close()
    _forward(read_end, child, signals)
    if task.leave:
        child.wait()  # it has one last record to write
    state = folder.read()
    assert state is not None
    on_ready(state)


def _forward(read_end: int, child: subprocess.Popen[bytes], signals: Signals) -> None:
    """Pass the supervisor's stages on to stderr until it is ready; a signal meant for us goes to it."""
    told = 0
    while True:
        for signum in signals.received[told:]:
            told += 1
            child.send_signal(signum)
        readable, _, _ = select.select([read_end], [], [], _TICK_S)
        if not readable:
            continue
        chunk = os.read(read_end, 65536)
        if not chunk:
            break
        text, ready, _ = chunk.partition(_READY)
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()
        if ready:
            return
    code = child.wait()
    if signals.received:
        raise Stopped(signals.received[0])
    raise SystemExit(code or 1)  # it has said why


_READY = b"\0ready\0"


def down(folder: StateFolder) -> bool:
    """Stop the cluster (or delete the application from a joined one) and wait; False if there was none."""
    state = folder.read()
    if state is None:
        return False
    supervisor = state.supervisor_process()
    if supervisor is not None:
        supervisor.send_signal(signal.SIGTERM)
        # Draining, then a while for the kills.
        deadline = time.monotonic() + state.parsed_config().stop_within_s + 10
        while state.supervisor_process() is not None and time.monotonic() < deadline:
            time.sleep(_TICK_S)
        if state.supervisor_process() is not None:
            supervisor.kill()
    left = folder.read()
    if left is not None and left.root == state.root:
        if state.joined and state.address:
            try:
                ask("delete", state)
            except DeepsplitError as error:
                print(f"deepsplit: Ray at {state.address} cannot be asked ({error}); forgetting it", file=sys.stderr)
        _sweep(left)
        folder.clear()
    return True


def _claim(config: Config, folder: StateFolder) -> None:
    """Take the lock, or raise StartupError; sweep what a killed supervisor left; check the port."""
    locked = folder.lock()
    state = folder.read()
    if not locked or (state is not None and not state.supervisor):
        if locked:
            folder.unlock()
        who = f" (pid {state.supervisor})" if state is not None and state.supervisor else ""
        where = f" on the Ray cluster at {state.address}" if state is not None and state.joined else ""
        raise StartupError(f"deepsplit is already running{who}{where}: run `deepsplit down` first")
    try:
        if state is not None:
            _sweep(state)
        if config.ray.address is None:
            check_versions(config.attention.device)
            check_ports(config.gateway)
    except StartupError:
        folder.clear()
        raise


def _sweep(state: ClusterState) -> None:
    """End what a killed supervisor left and remove its folder."""
    if state.root:
        end_all(Path(state.root), state.session or None, grace_s=0)
        shutil.rmtree(state.root, ignore_errors=True)


def _detached(ready_fd: int, folder: StateFolder) -> int:
    """Body of the process that `up_detached` starts. Its stderr is a pipe until ready, then nothing."""
    task = Task(**json.loads(sys.stdin.readline()))
    signals = Signals()
    signals.install()

    def on_ready(_: ClusterState) -> None:
        os.write(ready_fd, _READY)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2, ready_fd):
            os.dup2(null, stream)

    try:
        if not folder.lock():
            raise StartupError("deepsplit is already running: run `deepsplit down` first")
        Supervisor(task, folder, signals, Stages(sys.stderr, time.monotonic)).run(on_ready)
    except Stopped as stopped:
        return stopped.exit_code
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_detached(int(sys.argv[1]), StateFolder(Path(sys.argv[2]))))
