"""`deepsplit` as a user runs it, in a world of its own: runtime folder, temporary folder, port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

COMMAND = (sys.executable, "-m", "cluster.cli")
START_S, STOP_S = 400, 60


class Cli:
    """One user. `prefix` is put before each command, such as `ip netns exec HOST`."""

    def __init__(
        self, folder: Path, short: Path, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self._prefix = tuple(prefix)
        (folder / "run").mkdir(exist_ok=True)
        self._environment = (environment or os.environ) | {"XDG_RUNTIME_DIR": str(folder / "run"), "TMPDIR": str(short)}

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """The configuration as a file."""
        path = self.folder / "deepsplit.yaml"
        path.write_text(yaml.safe_dump(dict(config)))
        return path

    def run(self, *arguments: str | Path, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [*self._prefix, *COMMAND, *map(str, arguments)], env=dict(self._environment), cwd=self.folder,
            capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def up(self, config: Path) -> None:
        """Start detached; returns when the cluster is ready."""
        done = self.run("up", config, "--detach")
        assert done.returncode == 0, f"up failed:\n{done.stdout}\n{done.stderr}"

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        done = self.run("status", "--json", timeout_s=90)
        assert done.returncode == 0, f"status failed:\n{done.stdout}\n{done.stderr}"
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def down(self) -> None:
        """Stop whatever runs."""
        done = self.run("down", timeout_s=STOP_S + 60)
        assert done.returncode == 0, f"down failed:\n{done.stdout}\n{done.stderr}"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def complete(url: str, model: str, prompt: str | list[int], max_tokens: int, timeout_s: float = 180) -> list[int]:
    """Greedy token ids through the gateway."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=timeout_s)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def stream(url: str, model: str, prompt: str, max_tokens: int, after: Mapping[int, Callable[[], None]]) -> list[int]:
    """Greedy token ids, streamed. `after[n]` is called as soon as the client has n tokens."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    ids: list[int] = []
    due = sorted(after)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=180) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                ids += choice["token_ids"] or []
            while due and len(ids) >= due[0]:
                after[due.pop(0)]()
    assert not due, "the stream ended first"
    return ids


def metric(url: str, role: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples with these labels, over the processes of a role in the gateway's service discovery."""
    total = 0.0
    for group in httpx.get(f"{url}/sd/prometheus", timeout=30).json():
        if group["labels"]["role"] != role:
            continue
        for target in group["targets"]:
            text = httpx.get(f"http://{target}/metrics", timeout=30).text
            total += sum(
                sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == name and labels.items() <= sample.labels.items()
            )
    return total


def wait_until(what: str, happened: Any, timeout_s: float) -> None:
    """Poll until `happened()` is true."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.5)
