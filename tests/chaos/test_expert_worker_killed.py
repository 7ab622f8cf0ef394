"""The whole product on the demo model, as `make serve` runs it: what a killed expert worker does to it (nothing)."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli import Cli, complete, free_port, metric, stream, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def cli(no_leftovers: None, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as short:
        made = Cli(tmp_path_factory.mktemp("user"), Path(short))
        config: dict[str, Any] = {
            # float32, where no two tokens are near enough to tie, so "the same" means the same.
            "model": {"path": str(demo_model), "name": "demo", "dtype": "float32"},
            "attention": {"kv_cache_gib": 0.25, "speculative_tokens": 1, "max_model_len": 1024},
            "experts": {"workers": 2},
            "gateway": {"port": free_port(), "grpc_port": free_port()},
        }
        made.up(made.write_config(config))
        yield made
        made.down()
        assert list(Path(short).iterdir()) == []


def ready_workers(cli: Cli) -> list[dict[str, Any]]:
    return [worker for worker in cli.status()["experts"] if worker["state"] == "ready"]


def test_status_says_who_holds_what(cli: Cli) -> None:
    report = cli.status()
    assert report["model"] == "demo"
    assert report["placement_epoch"] >= 1
    assert [replica["state"] for replica in report["attention"]] == ["ready"]
    held = [worker["experts"]["1"] for worker in report["experts"]]
    assert sorted(expert for ids in held for expert in ids) == list(range(len(held[0]) + len(held[1])))
    for process in report["attention"] + report["experts"]:
        assert psutil.pid_exists(process["pid"])


def test_experts_listen_on_loopback_only(cli: Cli) -> None:
    assert {worker["address"].rsplit(":", 1)[0] for worker in cli.status()["experts"]} == {"127.0.0.1"}


def test_a_second_up_is_refused_with_the_way_out(cli: Cli) -> None:
    again = cli.run("up", cli.folder / "deepsplit.yaml")
    assert again.returncode != 0
    assert "deepsplit down" in again.stderr


def test_killed_between_two_requests(cli: Cli) -> None:
    before = cli.status()
    url = before["gateway"]["rest"]
    expected = complete(url, "demo", PROMPT, 24)
    victim = before["experts"][0]["pid"]
    os.kill(victim, signal.SIGKILL)
    assert complete(url, "demo", PROMPT, 24) == expected
    wait_until("a new worker", lambda: len(ready_workers(cli)) == 2, 60)
    after = cli.status()
    assert after["attention"] == before["attention"]  # same process, never touched
    assert victim not in [worker["pid"] for worker in after["experts"]]
    assert after["placement_epoch"] > before["placement_epoch"]
    assert complete(url, "demo", PROMPT, 24) == expected


def test_killed_in_the_middle_of_a_request(cli: Cli) -> None:
    report = cli.status()
    url = report["gateway"]["rest"]
    expected = complete(url, "demo", PROMPT, 200)
    victim = report["experts"][1]["pid"]
    failovers = metric(url, "engine", "deepsplit_dispatch_failovers_total")
    # The client has 20 of 200 tokens when the worker dies, so the request is in flight.
    got = stream(url, "demo", PROMPT, 200, {20: lambda: os.kill(victim, signal.SIGKILL)})
    assert got == expected
    # The engine's own count: a dispatch lost its worker, was sent again and ended well.
    assert metric(url, "engine", "deepsplit_dispatch_failovers_total") > failovers
    assert cli.status()["attention"] == report["attention"]
    assert victim not in [worker["pid"] for worker in ready_workers(cli)]


def test_a_stopped_attention_replica_does_not_hold_the_directory_up(cli: Cli) -> None:
    before = cli.status()
    (replica,) = before["attention"]
    victim = before["experts"][0]["id"]
    os.kill(replica["pid"], signal.SIGSTOP)  # it waits for the directory's answer, as always
    try:
        os.kill(before["experts"][0]["pid"], signal.SIGKILL)
        wait_until("a table without it", lambda: victim not in [one["id"] for one in ready_workers(cli)], 10)
    finally:
        os.kill(replica["pid"], signal.SIGCONT)
    wait_until("a new worker", lambda: len(ready_workers(cli)) == 2, 60)
    url = before["gateway"]["rest"]
    assert complete(url, "demo", PROMPT, 24) == complete(url, "demo", PROMPT, 24)
    assert cli.status()["attention"] == before["attention"]


def test_killed_directory_stops_nothing(cli: Cli) -> None:
    wait_until("the worker that replaces the killed one", lambda: len(ready_workers(cli)) == 2, 60)
    before = cli.status()
    url = before["gateway"]["rest"]
    expected = complete(url, "demo", PROMPT, 24)
    driver = psutil.Process(before["supervisor"]["pid"])
    (directory,) = [p for p in driver.children(recursive=True) if "ServeReplica:deepsplit:Directory" in _title(p)]
    directory.kill()
    assert complete(url, "demo", PROMPT, 24) == expected

    def recovered() -> bool:
        done = cli.run("status", "--json", timeout_s=90)
        if done.returncode != 0:
            return False
        after = json.loads(done.stdout)
        return after["placement_epoch"] > before["placement_epoch"] and len(after["experts"]) == 2

    wait_until("a new directory that knows all workers", recovered, 90)
    after = cli.status()
    assert {w["pid"] for w in after["experts"]} == {w["pid"] for w in before["experts"]}
    assert complete(url, "demo", PROMPT, 24) == expected


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
