"""`deepsplit up`, `status`, `scale`, `restart` and `down`: one cluster per user, in the foreground or detached."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cluster.addresses import bracketed
from cluster.config import Config
from cluster.errors import DeepsplitError, StartupError
from cluster.launch.driver import Job
from cluster.launch.driver_process import as_error, log_tail, make_root, read_events, start_driver, token_path
from cluster.launch.preflight import check_ports, check_versions
from cluster.launch.processes import end_all
from cluster.launch.progress import Stages
from cluster.launch.state import ClusterState, StateFolder
from cluster.launch.supervisor import Signals, Stopped, Supervisor, Task

BUILDER = "deployments.app:build"
_QUERY_TIMEOUT_S = 60.0
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
                _ask("delete", state)
            except DeepsplitError as error:
                print(f"deepsplit: Ray at {state.address} cannot be asked ({error}); forgetting it", file=sys.stderr)
        _sweep(left)
        folder.clear()
    return True


def status(folder: StateFolder) -> dict[str, object]:
    """What `deepsplit status --json` prints. Raises StartupError when nothing runs."""
    state = folder.read()
    if state is None or (state.supervisor and state.supervisor_process() is None):
        what = "no cluster is running" if state is None else "the cluster's supervisor was killed"
        raise StartupError(f"{what}: {'start one with `deepsplit up`' if state is None else 'run `deepsplit down`'}")
    config = state.parsed_config()
    report: dict[str, object] = {
        "state": "ready" if state.ready else "starting",
        "model": config.model.served_name,
        "gateway": {"rest": rest_url(config), "grpc": grpc_target(config)},
        "ray": {"address": state.address, "joined": state.joined},
        "supervisor": {"pid": state.supervisor or None},
        "attention": [],
        "experts": [],
        "placement_epoch": 0,
    }
    return report | json.loads(_ask("status", state)) if state.ready else report


def scale(folder: StateFolder, wanted: Mapping[str, int], wait_s: float, on_progress: Callable[[str], None]) -> None:
    """Have as many processes of each role as `wanted` says, and wait for them. Raises StartupError when nothing runs,
    when that cannot be, or when they are not there after `wait_s` seconds; the wish stands then.
    """
    state = folder.read()
    if status(folder)["state"] != "ready" or state is None:
        raise StartupError("the cluster is still starting: ask again when `deepsplit status` says ready")
    if why_not := _ask("scale", state, wanted):
        raise StartupError(why_not)
    deadline, told = time.monotonic() + wait_s, ""
    while True:
        report = _status_until(folder, deadline)
        states = {role: _states(report[role]) for role in wanted}
        text = "; ".join(f"{role}: {count} wanted, {_counted(states[role])}" for role, count in wanted.items())
        if text != told:
            on_progress(text)
            told = text
        if all(states[role] == ["ready"] * count for role, count in wanted.items()):
            return
        if time.monotonic() > deadline:
            raise StartupError(
                f"not there after {wait_s:g} s ({text}); Serve goes on trying. If Ray has no room: "
                f"{'add nodes' if state.joined else 'set ray.num_cpus to more and start again'}, or ask for less"
            )
        time.sleep(1)


def restart_experts(folder: StateFolder, wait_s: float, on_progress: Callable[[str], None]) -> None:
    """Replace every expert worker, one after the other. Raises StartupError when nothing runs, when that cannot be, or
    when it is not done after `wait_s` seconds.
    """
    state, report = folder.read(), status(folder)
    if report["state"] != "ready" or state is None:
        raise StartupError("the cluster is still starting: ask again when `deepsplit status` says ready")
    old = _ids(report["experts"])
    if why_not := _ask("restart", state):
        raise StartupError(why_not)
    deadline, told = time.monotonic() + wait_s, ""
    while True:
        report = _status_until(folder, deadline)
        left, states = old & _ids(report["experts"]), _states(report["experts"])
        text = f"experts: {len(old) - len(left)} of {len(old)} replaced, {_counted(states)}"
        if text != told:
            on_progress(text)
            told = text
        if not left and states == ["ready"] * len(old):
            return
        if left and not report["to_restart"]:
            raise StartupError(f"stopped half-way ({text}): the directory was restarted meanwhile; run it again")
        if time.monotonic() > deadline:
            raise StartupError(f"not done after {wait_s:g} s ({text}); it goes on: see `deepsplit status`")
        time.sleep(1)


def _status_until(folder: StateFolder, deadline: float) -> dict[str, object]:
    """`status`, asked again while the directory is being restarted. Raises StartupError after `deadline`."""
    while True:
        try:
            return status(folder)
        except DeepsplitError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _ids(processes: object) -> set[str]:
    assert isinstance(processes, list)
    return {process["id"] for process in processes}


def _states(processes: object) -> list[str]:
    assert isinstance(processes, list)
    return [process["state"] for process in processes]


def _counted(states: Sequence[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items())) or "none"


def rest_url(config: Config) -> str:
    """Base URL of the REST gateway, as this machine reaches it."""
    return f"{'https' if config.gateway.tls else 'http'}://{_reachable(config.gateway.host)}:{config.gateway.port}"


def grpc_target(config: Config) -> str | None:
    """host:port of the gRPC API, as this machine reaches it; None when it is off."""
    port = config.gateway.grpc_port
    return None if port is None else f"{_reachable(config.gateway.host)}:{port}"


def _reachable(host: str) -> str:
    return bracketed("127.0.0.1" if host in ("0.0.0.0", "::", "") else host)


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


def _ask(
    action: Literal["status", "scale", "restart", "delete"],
    state: ClusterState,
    wanted: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Run a driver for one request to a running cluster."""
    root = make_root()
    read_end, write_end = os.pipe()
    job = Job(action, state.config, state.address, str(root), write_end, "", {}, {}, dict(wanted))
    driver = start_driver(job, None if state.joined else token_path(Path(state.root)))
    os.close(write_end)
    deadline = time.monotonic() + _QUERY_TIMEOUT_S
    try:
        for event in read_events(read_end, driver):
            if event is not None and event.kind == "failed":
                raise as_error(event)
            if event is not None and event.kind == "result":
                return event.text
            if time.monotonic() > deadline:
                raise StartupError(f"the cluster at {state.address} did not answer within {_QUERY_TIMEOUT_S:g} s")
        raise StartupError(f"could not ask the cluster at {state.address}:\n{log_tail(root)}")
    finally:
        driver.kill()
        driver.wait()
        shutil.rmtree(root, ignore_errors=True)


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
