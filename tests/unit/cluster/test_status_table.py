"""`deepsplit status`, as a user reads it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from cluster import cli


def test_each_process_with_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = {"id": "w", "pid": 2, "node": "n", "address": "n:1", "state": "ready", "experts": {"1": [0, 1]}}
    report = {
        "model": "m", "state": "ready", "placement_epoch": 3,
        "attention": [{"id": "a", "pid": 1, "node": "n", "state": "ready", "cores": "cores 1-2 of NUMA node 0"}],
        "experts": [worker | {"cores": "", "form": "int8, vLLM's packed kernel"}],
    }  # fmt: skip
    monkeypatch.setattr(cli, "status", lambda folder: report)
    assert CliRunner().invoke(cli.cli, ["status"]).stdout.splitlines() == [
        "model      m (ready)",
        "placement  epoch 3",
        "attention  a  pid 1  node n  ready",
        "           cores 1-2 of NUMA node 0",
        "experts    w  pid 2  node n  ready  2 experts in 1 layers, n:1",
        "           int8, vLLM's packed kernel",
    ]
