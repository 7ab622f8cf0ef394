"""Faults of `make chaos` once, with two holders of each expert: no request fails, every token is the right one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FAULTS = ["kill", "stop", "slow", "directory", "both"]  # test_scaling.py scales

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


def test_no_request_fails_whatever_is_lost(demo_model: object) -> None:
    command = [sys.executable, "-m", "benchmarks.failover", "--times", "1", "--replicas", "2", "--json"]
    done = subprocess.run([*command, "--fault", *FAULTS], capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert [one["fault"] for one in outcomes] == FAULTS
    assert {one["fault"]: one["failed"] for one in outcomes if one["failed"]} == {}
    assert all(one["requests"] > 0 and one["gaps_s"] for one in outcomes)
