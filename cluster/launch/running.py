"""What is asked of a running cluster: `deepsplit status`, `scale` and `restart`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cluster.addresses import bracketed
from cluster.config import Config
from cluster.errors import DeepsplitError, StartupError
from cluster.launch.driver import Job
from cluster.launch.driver_process import as_error, log_tail, make_root, read_events, start_driver, token_path
from cluster.launch.state import ClusterState, StateFolder

_QUERY_TIMEOUT_S = 60.0

Report = dict[str, object]  # what `deepsplit status --json` prints


def status(folder: StateFolder) -> Report:
    """What `deepsplit status --json` prints. Raises StartupError when nothing runs."""
    state = folder.read()
    if state is None or (state.supervisor and state.supervisor_process() is None):
        what = "no cluster is running" if state is None else "the cluster's supervisor was killed"
        raise StartupError(f"{what}: {'start one with `deepsplit up`' if state is None else 'run `deepsplit down`'}")
    config = state.parsed_config()
    report: Report = {
        "state": "ready" if state.ready else "starting",
        "model": config.model.served_name,
        "gateway": {"rest": rest_url(config), "grpc": grpc_target(config)},
        "ray": {"address": state.address, "joined": state.joined},
        "supervisor": {"pid": state.supervisor or None},
        "attention": [],
        "experts": [],
        "placement_epoch": 0,
    }
    return report | json.loads(ask("status", state)) if state.ready else report


def scale(folder: StateFolder, wanted: Mapping[str, int], wait_s: float, on_progress: Callable[[str], None]) -> None:
    """Have as many processes of each role (`experts.POOL`: of one pool) as `wanted` says, and wait for them. Raises
    StartupError when nothing runs, when that cannot be, or when they are not there after `wait_s` seconds; the wish
    stands then.
    """
    state, _ = _ready_state(folder)
    if why_not := ask("scale", state, wanted):
        raise StartupError(why_not)

    def look(report: Report) -> tuple[str, bool]:
        states = {role: _states(_of(report, role)) for role in wanted}
        text = "; ".join(f"{role}: {count} wanted, {_counted(states[role])}" for role, count in wanted.items())
        return text, all(states[role] == ["ready"] * count for role, count in wanted.items())

    room = "add nodes" if state.joined else "set ray.num_cpus to more and start again"
    _watch(folder, wait_s, on_progress, look, f"Serve goes on trying. If Ray has no room: {room}, or ask for less")


def restart_experts(folder: StateFolder, wait_s: float, on_progress: Callable[[str], None]) -> None:
    """Replace every expert worker, one after the other. Raises StartupError when nothing runs, when that cannot be, or
    when it is not done after `wait_s` seconds.
    """
    state, report = _ready_state(folder)
    old = {worker["id"] for worker in _of(report, "experts")}
    if why_not := ask("restart", state):
        raise StartupError(why_not)

    def look(report: Report) -> tuple[str, bool]:
        workers = _of(report, "experts")
        left, states = old & {worker["id"] for worker in workers}, _states(workers)
        text = f"experts: {len(old) - len(left)} of {len(old)} replaced, {_counted(states)}"
        if left and not report["to_restart"]:
            raise StartupError(f"stopped half-way ({text}): the directory was restarted meanwhile; run it again")
        return text, not left and states == ["ready"] * len(old)

    _watch(folder, wait_s, on_progress, look, "it goes on: see `deepsplit status`")


def _ready_state(folder: StateFolder) -> tuple[ClusterState, Report]:
    state, report = folder.read(), status(folder)
    if report["state"] != "ready" or state is None:
        raise StartupError("the cluster is still starting: ask again when `deepsplit status` says ready")
    return state, report


def _watch(
    folder: StateFolder,
    wait_s: float,
    on_progress: Callable[[str], None],
    look: Callable[[Report], tuple[str, bool]],
    afterwards: str,
) -> None:
    """Ask for the status until `look` says that it is as asked for, and tell each change of what it says. Raises
    StartupError after `wait_s` seconds.
    """
    deadline, told = time.monotonic() + wait_s, ""
    while True:
        text, done = look(_status_until(folder, deadline))
        if text != told:
            on_progress(text)
            told = text
        if done:
            return
        if time.monotonic() > deadline:
            raise StartupError(f"not done after {wait_s:g} s ({text}); {afterwards}")
        time.sleep(1)


def _status_until(folder: StateFolder, deadline: float) -> Report:
    """`status`, asked again while the directory is being restarted. Raises StartupError after `deadline`."""
    while True:
        try:
            return status(folder)
        except DeepsplitError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def _of(report: Report, role: str) -> list[dict[str, str]]:
    role, _, pool = role.partition(".")
    processes = report[role]
    assert isinstance(processes, list)
    return [process for process in processes if not pool or process["pool"] == pool]


def _states(processes: Sequence[Mapping[str, str]]) -> list[str]:
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


def ask(
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
