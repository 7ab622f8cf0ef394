"""The whole product for a benchmark, started as an operator starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from benchmarks.measuring.free_port import free_port

_COMMAND = (sys.executable, "-m", "cluster.cli")


class Application:
    """`deepsplit up --detach` and `down`, in a world of its own."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`folder`: empty, with a short path. `environment`: added to this process's. The gateway gets a free port."""
        (folder / "run").mkdir(mode=0o700)
        self.environment = os.environ | {"XDG_RUNTIME_DIR": str(folder / "run")} | dict(environment)
        self._config = folder / "deepsplit.yaml"
        gateway = {"gateway": {"port": free_port(), "grpc_port": None}}
        self._config.write_text(json.dumps({**config, **gateway}))  # JSON is YAML

    def __enter__(self) -> Application:
        up = subprocess.run([*_COMMAND, "up", str(self._config), "--detach"], env=self.environment, check=False,
                            capture_output=True, text=True)  # fmt: skip
        if up.returncode != 0:
            raise SystemExit(f"the cluster did not start:\n{up.stderr}")
        return self

    def __exit__(self, *error: object) -> None:
        subprocess.run([*_COMMAND, "down"], env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def status(self) -> dict[str, Any]:
        """`deepsplit status --json`."""
        told = subprocess.check_output([*_COMMAND, "status", "--json"], env=self.environment)
        report: dict[str, Any] = json.loads(told)
        return report

    def ready(self) -> list[dict[str, Any]]:
        """The workers that are ready; none while the directory does not answer."""
        try:
            return [worker for worker in self.status()["experts"] if worker["state"] == "ready"]
        except subprocess.CalledProcessError:
            return []

    def directory(self) -> int:
        """The process of the directory."""
        supervisor = psutil.Process(self.status()["supervisor"]["pid"])
        (found,) = [process.pid for process in supervisor.children(recursive=True)
                    if "ServeReplica:deepsplit:Directory" in " ".join(process.cmdline())]  # fmt: skip
        return found

    def restart(self) -> None:
        """`deepsplit restart experts`."""
        subprocess.run([*_COMMAND, "restart", "experts"], env=self.environment, check=True,
                       stderr=subprocess.DEVNULL)  # fmt: skip

    def scale(self, workers: int) -> None:
        """`deepsplit scale`."""
        subprocess.run([*_COMMAND, "scale", f"experts={workers}"], env=self.environment, check=True,
                       stderr=subprocess.DEVNULL)  # fmt: skip
