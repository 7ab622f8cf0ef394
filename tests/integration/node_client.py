"""OpenAI's own Node client, installed from its lock file into a temporary folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).parent / "node"


class NodeClient:
    """`run("answers", url, ...)` runs one scenario of node/client.mjs."""

    def __init__(self, folder: Path) -> None:
        """Installs into `folder`."""
        shutil.copytree(_SOURCE, folder, dirs_exist_ok=True)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        self._folder = folder

    def run(self, scenario: str, url: str, model: str, key: str = "none") -> dict[str, Any]:
        """What the scenario saw."""
        done = subprocess.run(
            ["node", "client.mjs", f"{url}/v1", key, model, scenario],
            cwd=self._folder, check=False, timeout=240, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout)
        return seen
