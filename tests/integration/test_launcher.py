"""The launcher with real processes: a real local Ray cluster each time, with a Serve application that is light."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli import free_port
from tests.integration.tiny_app import DRAIN_S
from tests.tiny_checkpoint import write_tiny_checkpoint

REPO = Path(__file__).parents[2]
START_S = 120  # on a machine that also does other things
STOP_S = 40


class Bench:
    """One user's world: a runtime folder, a temporary folder and a configuration file of its own."""

    def __init__(self, folder: Path, short: Path) -> None:
        self.folder = folder
        self.temporary = short
        self.port, self.grpc_port = free_port(), free_port()
        self.env = os.environ | {"XDG_RUNTIME_DIR": str(folder / "run"), "TMPDIR": str(short), "PYTHONPATH": str(REPO)}
        self.started: list[subprocess.Popen[str]] = []
        (folder / "run").mkdir()

    def config(self, name: str = "tiny") -> Path:
        path = self.folder / f"{name}.yaml"
        model = write_tiny_checkpoint(self.folder / "model")
        ports = f"{{port: {self.port}, grpc_port: {self.grpc_port}}}"
        path.write_text(f"model: {{path: {model}, name: {name}}}\ngateway: {ports}\n")
        return path

    def up(self, *options: str, name: str = "tiny") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, "up", str(self.config(name)), "--builder", "tests.integration.tiny_app:build", *options],
            env=self.env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=START_S,
            check=False,
        )  # fmt: skip

    def processes(self) -> list[str]:
        """Live processes of the cluster: by its mark, or by its folder in the command line."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                mark = process.environ().get("DEEPSPLIT_CLUSTER", "")
                if process.status() != psutil.STATUS_ZOMBIE and str(self.temporary) in mark + " ".join(words):
                    found.append(f"{process.pid} {' '.join(words)}"[:120])
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert list(self.temporary.iterdir()) == []
        assert list((self.folder / "run").iterdir()) == []


COMMAND = (sys.executable, "-m", "cluster.cli")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    # Not under tmp_path, whose length would make Ray's socket paths too long.
    short = Path(f"/tmp/dst{os.getpid()}")
    short.mkdir()
    bench = Bench(tmp_path, short)
    yield bench
    for process in bench.started:
        process.kill()
        process.communicate()
    bench.run("down")
    subprocess.run(["rm", "-rf", str(short)], check=True)


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads stderr up to the line that matches."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.search(pattern, line):
            return line
    pytest.fail(f"no line like {pattern!r} in:\n{''.join(seen)}")


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + STOP_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_whole_life(bench: Bench) -> None:
    process = bench.up()
    wait_for_line(process, "Ray started")
    wait_for_line(process, "experts loaded")
    wait_for_line(process, "gateway ready")

    report = json.loads(bench.run("status", "--json").stdout)
    assert report["model"] == "tiny"
    assert report["gateway"] == {"rest": f"http://127.0.0.1:{bench.port}", "grpc": f"127.0.0.1:{bench.grpc_port}"}
    assert report["placement_epoch"] == 7
    assert [worker["experts"] for worker in report["experts"]] == [{"1": [0, 1]}, {"1": [2, 3]}]

    began = time.monotonic()
    second = bench.run("up", str(bench.config()))
    assert second.returncode == 1
    assert f"already running (pid {process.pid}): run `deepsplit down`" in second.stderr
    assert time.monotonic() - began < 10  # said before anything heavy started

    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=STOP_S)
    assert process.returncode == 130
    assert f"curl -s http://127.0.0.1:{bench.port}/v1/completions" in out
    bench.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.5, 2.5, 6.0])
def test_interrupt_while_ray_starts(bench: Bench, delay_s: float) -> None:
    process = bench.up()
    wait_for_line(process, "environment checked")
    time.sleep(delay_s)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=STOP_S)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    bench.assert_nothing_left()


@pytest.mark.slow
def test_terminated_while_a_deployment_starts(bench: Bench) -> None:
    process = bench.up(name="slow")
    wait_for_line(process, "experts loaded")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=STOP_S)
    assert process.returncode == 143
    bench.assert_nothing_left()


@pytest.mark.slow
def test_failing_deployment_stops_the_start_with_its_own_message(bench: Bench) -> None:
    process = bench.up(name="broken")
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 1
    assert "error: shard 3 is truncated: copy it again\n" in err
    assert "Traceback" not in err
    bench.assert_nothing_left()


@pytest.mark.slow
def test_detached_then_down(bench: Bench) -> None:
    process = bench.up("--detach")
    out, err = process.communicate(timeout=START_S)
    assert process.returncode == 0, err
    assert "gateway ready" in err
    assert "curl -s" in out
    with urllib.request.urlopen(f"http://127.0.0.1:{bench.port}/", timeout=10) as answer:
        assert answer.read() == b"tiny"
    assert bench.processes() != []

    down = bench.run("down")
    assert (down.returncode, down.stdout) == (0, "stopped\n")
    bench.assert_nothing_left()
    assert bench.run("down").stdout == "nothing is running\n"


@pytest.mark.slow
def test_running_requests_are_drained_before_anything_stops(bench: Bench) -> None:
    process = bench.up(name="busy")
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("REST"))  # ready: there may be requests
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert "running requests have 30 s" in wait_for_line(process, "stopping")
    process.communicate(timeout=STOP_S)
    assert time.monotonic() - began >= DRAIN_S
    bench.assert_nothing_left()


@pytest.mark.slow
def test_killed_supervisor_leaves_nothing(bench: Bench) -> None:
    process = bench.up()
    wait_for_line(process, "gateway ready")
    process.kill()
    process.communicate()
    # The driver notices that its lifeline ended and sweeps; `down` then has only the record to clear.
    refused = bench.run("status")
    assert refused.returncode == 1
    assert "run `deepsplit down`" in refused.stderr
    assert bench.run("down").stdout == "stopped\n"
    bench.assert_nothing_left()


@pytest.mark.slow
def test_joined_cluster_keeps_running_without_the_application(bench: Bench) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bench.env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    options = ["--head", f"--port={port}", "--num-cpus=8", "--include-dashboard=false", "--block"]
    head_env = bench.env | {"DEEPSPLIT_CLUSTER": ""}
    with (bench.folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options, f"--temp-dir={bench.temporary}r"],
            env=head_env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (bench.folder / "head.log").read_text():
            assert head.poll() is None, (bench.folder / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        config = bench.config()
        config.write_text(config.read_text() + f"ray: {{address: '127.0.0.1:{port}'}}\n")
        up = bench.run("up", str(config), "--builder", "tests.integration.tiny_app:build", "--detach")
        assert up.returncode == 0, up.stderr
        assert "Ray cluster joined" in up.stderr
        report = json.loads(bench.run("status", "--json").stdout)
        assert (report["ray"]["joined"], report["supervisor"]["pid"], report["placement_epoch"]) == (True, None, 7)
        second = bench.run("up", str(config), "--builder", "tests.integration.tiny_app:build")
        assert "already running on the Ray cluster at" in second.stderr

        assert bench.run("down").stdout == "stopped\n"
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{bench.port}/", timeout=10)
        assert head.poll() is None
        assert list((bench.folder / "run").iterdir()) == []
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == head.pid:
                    process.kill()
        head.wait()
        shutil.rmtree(f"{bench.temporary}r", ignore_errors=True)


@pytest.mark.parametrize("key", ["port", "grpc_port"])
def test_port_in_use_is_found_before_anything_starts(bench: Bench, key: str) -> None:
    port = getattr(bench, key)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        failed = bench.run("up", str(bench.config()))
    assert failed.returncode == 1
    assert f"127.0.0.1:{port} is already in use" in failed.stderr
    assert f"(pid {os.getpid()})" in failed.stderr
    assert f"set gateway.{key}" in failed.stderr
    bench.assert_nothing_left()


def test_what_does_not_fit_is_not_started(bench: Bench) -> None:
    config = bench.config()
    config.write_text(config.read_text() + "attention: {kv_cache_gib: 1000000}\n")
    failed = bench.run("up", str(config))
    assert failed.returncode == 1
    assert "the plan does not fit" in failed.stderr
    assert "lower attention.kv_cache_gib" in failed.stderr
    bench.assert_nothing_left()


def test_nothing_running(bench: Bench) -> None:
    status = bench.run("status")
    assert status.returncode == 1
    assert "no cluster is running: start one with `deepsplit up`" in status.stderr
