"""`deepsplit scale` and `restart` under requests that compare each token; a lost directory in between."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli import Cli, complete, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def cli(no_leftovers: None, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as short:
        made = Cli(tmp_path_factory.mktemp("user"), Path(short))
        config: dict[str, Any] = {
            "model": {"path": str(demo_model), "name": "demo", "dtype": "float32"},  # where tokens can be compared
            "attention": {"kv_cache_gib": 0.25, "max_model_len": 1024},
            "experts": {"workers": 2},
            "gateway": {"port": free_port(), "grpc_port": None},
            "ray": {"num_cpus": 12},
        }
        made.up(made.write_config(config))
        yield made
        made.down()


class Asking:
    """A client that asks for the same again and again. Use as a context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._expected = complete(url, "demo", PROMPT, 64)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.answers = 0
        self.wrong: list[object] = []

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._done.is_set():
            try:
                answer: object = complete(self._url, "demo", PROMPT, 64)
            except Exception as error:
                answer = error
            self.answers += 1
            if answer != self._expected:
                self.wrong.append(answer)


def held(cli: Cli) -> list[int]:
    return sorted(len(worker["experts"]["1"]) for worker in cli.status()["experts"] if worker["state"] == "ready")


def scaled(cli: Cli, *wanted: str) -> None:
    done = cli.run("scale", *wanted, "--timeout", "120")
    assert done.returncode == 0, done.stderr


def test_workers_come_and_go_and_nobody_notices(cli: Cli) -> None:
    before = cli.status()
    experts = sum(held(cli))
    with Asking(before["gateway"]["rest"]) as client:
        scaled(cli, "experts=4")
        assert held(cli) == [experts // 4] * 4
        driver = psutil.Process(before["supervisor"]["pid"])
        (directory,) = [p for p in driver.children(recursive=True) if "ServeReplica:deepsplit:Directory" in p.name()
                        or "ServeReplica:deepsplit:Directory" in " ".join(p.cmdline())]  # fmt: skip
        os.kill(directory.pid, signal.SIGKILL)

        def remembered() -> bool:
            done = cli.run("status", "--json", timeout_s=90)
            return done.returncode == 0 and '"experts": 4' in done.stdout and len(held(cli)) == 4

        wait_until("a new directory that knows of all four", remembered, 60)
        scaled(cli, "experts=2")
        assert held(cli) == [experts // 2] * 2
    after = cli.status()
    assert after["wanted"] == {"experts": 2, "attention": 1}
    assert after["attention"] == before["attention"]
    assert client.answers > 10
    assert client.wrong == []


def test_all_workers_are_replaced_and_nobody_notices(cli: Cli) -> None:
    before = cli.status()
    with Asking(before["gateway"]["rest"]) as client:
        done = cli.run("restart", "experts", "--timeout", "120")
        assert done.returncode == 0, done.stderr
    assert "2 of 2 replaced, 2 ready" in done.stderr
    after = cli.status()
    assert {w["pid"] for w in after["experts"]}.isdisjoint(w["pid"] for w in before["experts"])
    assert after["attention"] == before["attention"]
    assert client.answers > 10
    assert client.wrong == []


def test_what_cannot_be_is_said_and_changes_nothing(cli: Cli) -> None:
    before = cli.status()
    done = cli.run("scale", "experts=1000")
    assert done.returncode == 1
    assert "copies of experts in a layer" in done.stderr
    assert cli.status()["wanted"] == before["wanted"]
