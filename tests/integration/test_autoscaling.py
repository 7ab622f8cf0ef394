"""Serve follows what attention replicas say of themselves, and the directory's wishes; fakes say it here."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from cluster.config import AttentionAutoscaling
from deployments.hosting.autoscaling import OCCUPANCY, WISH, WISH_VERSION, on_wish, serve_autoscaling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


class Said:
    """Says of itself what a file says, as JSON."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        said: dict[str, float] = json.loads(self._file.read_text())
        return said


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="deepsplit-", dir="/tmp"))  # short: Ray's sockets live in it
    try:
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(made),
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}},
        )  # fmt: skip
        serve.start(proxy_location="Disabled")
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize(
    ("scaling", "steps"),
    [
        (serve_autoscaling(AttentionAutoscaling(max_replicas=3, upscale_delay_s=0, downscale_delay_s=0), 1),
         [({OCCUPANCY: 0.5}, 1), ({OCCUPANCY: 1.0}, 3), ({OCCUPANCY: 0.1}, 1)]),
        (on_wish(2),
         [({}, 2), ({WISH: 3.0, WISH_VERSION: 5.0}, 3), ({WISH: 1.0, WISH_VERSION: 6.0}, 1)]),
    ],
)  # fmt: skip
def test_serve_follows_what_replicas_say(
    folder: Path, scaling: AutoscalingConfig, steps: list[tuple[dict[str, float], int]]
) -> None:
    said = folder / "said"
    said.write_text(json.dumps(steps[0][0]))
    quick = {"metrics_interval_s": 0.5, "look_back_period_s": 2.0}
    deployment = serve.deployment(
        Said, name="scaled", autoscaling_config=scaling.model_copy(update=quick), ray_actor_options={"num_cpus": 0.1}
    )
    serve.run(deployment.bind(str(said)), name="app", route_prefix=None)

    def running() -> int:
        return serve.status().applications["app"].deployments["scaled"].replica_states.get("RUNNING", 0)

    for stats, replicas in steps:
        said.write_text(json.dumps(stats))
        deadline = time.monotonic() + 60
        while running() != replicas:
            assert time.monotonic() < deadline, f"{running()} replicas at {stats}"
            time.sleep(0.5)
