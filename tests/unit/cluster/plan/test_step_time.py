"""The estimate of a decode step, against sums done by hand and against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.plan.bandwidth import bandwidth_gb_per_s
from cluster.plan.step_time import (
    HostSpeed,
    StepSizes,
    StepTime,
    distinct_experts,
    step_times,
    workers_and_hosts_per_row,
)
from tests.tiny_checkpoint import write_tiny_checkpoint

EXAMPLES = Path(__file__).parents[4] / "examples"
SIZES = StepSizes(
    attention_bytes=10**9, attention_params=5 * 10**8, layers=10, experts=64, top_k=8, expert_bytes=10**7,
    expert_params=5 * 10**6, wire_bytes_per_row=19_000.0, workers_per_row=2.0,
)  # fmt: skip
SPEED = HostSpeed(cores=4, bandwidth_gb_per_s=100.0, gflop_per_s=400.0, network_gb_per_s=None)


def steps(speed: HostSpeed = SPEED, sizes: StepSizes = SIZES, hosts: str = "aa", gpus: int = 0) -> list[StepTime]:
    return list(step_times(sizes, [32, 32], 1, [1, 1], list(hosts), 2, gpus, speed, (1, 8)))


def test_one_row_by_hand() -> None:
    one = steps()[0]
    assert one.attention_s == pytest.approx(1e9 / (0.6 * 100e9 * 2 / 4) + 2e-3 + 1e-4)
    assert one.experts_s == pytest.approx(10 * 4 * 1e7 / (0.6 * 100e9 / 4))  # four of eight experts each
    assert one.dispatch_s == pytest.approx(10 * (0.3e-3 + 2 * 16e-6 + 19_000 / 1.9e9))
    assert one.tokens_per_s == pytest.approx(1 / one.step_s)
    assert one.binds == "attention: memory bandwidth"


def test_what_is_faster_and_what_binds() -> None:
    slow, eight = steps()
    assert eight.experts_s / slow.experts_s == pytest.approx(distinct_experts(64, 8, 8) / 8)
    twice = steps(replace(SPEED, bandwidth_gb_per_s=200.0))[0]
    assert twice.experts_s == pytest.approx(slow.experts_s / 2)
    assert steps(replace(SPEED, gflop_per_s=0.1))[0].binds.endswith("arithmetic")
    assert steps(replace(SPEED, network_gb_per_s=1e-3))[0].binds == "dispatch: bytes"
    assert steps(gpus=8)[0].attention_s < slow.attention_s
    crowded = step_times(SIZES, [32, 32], 1, [4, 4], ["a", "a"], 2, 0, SPEED, (1,))[0]
    alone = step_times(SIZES, [32, 32], 1, [4, 4], ["a", "b"], 2, 0, SPEED, (1,))[0]
    assert crowded.experts_s == pytest.approx(2 * alone.experts_s)


def test_distinct_experts_are_between_one_rows_and_all() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8)
    assert distinct_experts(256, 8, 10_000) == pytest.approx(256)


def test_hosts_per_row_are_no_more_than_workers() -> None:
    workers, hosts = workers_and_hosts_per_row([32] * 8, [f"h{at % 2}" for at in range(8)], 256, 8, 1)
    assert hosts == pytest.approx(2 * (1 - _missed(128)))
    assert workers == pytest.approx(8 * (1 - _missed(32)))


def _missed(count: int) -> float:
    chance = 1.0
    for at in range(8):
        chance *= (256 - count - at) / (256 - at)
    return chance


def test_the_command_says_what_a_step_would_take(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model": {"path": str(write_tiny_checkpoint(tmp_path / "m"))}}))
    run = CliRunner().invoke(cli, ["plan", str(config), "--cores", "8", "--bandwidth", "100"])
    assert "an estimate, for hosts of 8 cores, 100 GB/s of memory; one attention replica" in run.output
    told = CliRunner().invoke(cli, ["plan", str(config), "--cores", "8", "--bandwidth", "100", "--json"])
    plan = json.loads(told.output)
    assert [step["batch"] for step in plan["steps"]] == [1, 8, 32, 128]
    assert plan["speed"]["bandwidth_gb_per_s"] == 100.0


def test_deepseek_v3_on_large_hosts_is_plausible() -> None:
    config, nodes = EXAMPLES / "deepseek-v3.yaml", EXAMPLES / "deepseek-v3" / "nodes.yaml"
    arguments = ["plan", str(config), "--nodes", str(nodes), "--cores", "64", "--bandwidth", "400", "--network", "12.5"]
    told = CliRunner().invoke(cli, [*arguments, "--json"])
    one, *_, many = json.loads(told.output)["steps"]
    assert 0.02 < one["experts_s"] < 0.2
    assert many["binds"].startswith("experts")


def test_a_bandwidth_that_cannot_be_is_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["plan", str(EXAMPLES / "local.yaml"), "--bandwidth", "0"], standalone_mode=True)
    assert run.exit_code == 2
    assert "--bandwidth" in run.output


def test_this_hosts_bandwidth_is_a_machines() -> None:
    assert 0.5 < bandwidth_gb_per_s(1) < 10_000
