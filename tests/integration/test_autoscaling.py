"""Serve follows what attention replicas and expert workers say of themselves; fakes say it here."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from cluster.config import AttentionAutoscaling, ExpertSpares
from deployments.hosting.autoscaling import BUSY, OCCUPANCY, serve_autoscaling, spare_autoscaling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


class Busy:
    """As busy as a file says."""

    def __init__(self, file: str, measure: str) -> None:
        self._file = Path(file)
        self._measure = measure

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {self._measure: float(self._file.read_text())}


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
    ("measure", "scaling", "steps"),
    [
        (OCCUPANCY, serve_autoscaling(AttentionAutoscaling(max_replicas=3, upscale_delay_s=0, downscale_delay_s=0), 1),
         [("0.5", 1), ("1.0", 3), ("0.1", 1)]),
        # Beside two workers that are always there: 3 x 0.9 / 0.6 is 5 in all, so 3 more.
        (BUSY, spare_autoscaling(ExpertSpares(max_workers=3, upscale_delay_s=0, downscale_delay_s=0), helped=2),
         [("0.6", 1), ("0.9", 3), ("0.1", 1)]),
    ],
)  # fmt: skip
def test_serve_follows_what_replicas_say(
    folder: Path, measure: str, scaling: AutoscalingConfig, steps: list[tuple[str, int]]
) -> None:
    said = folder / "said"
    said.write_text(steps[0][0])
    quick = {"metrics_interval_s": 0.5, "look_back_period_s": 2.0}
    deployment = serve.deployment(
        Busy, name="scaled", autoscaling_config=scaling.model_copy(update=quick), ray_actor_options={"num_cpus": 0.1}
    )
    serve.run(deployment.bind(str(said), measure), name="app", route_prefix=None)

    def running() -> int:
        return serve.status().applications["app"].deployments["scaled"].replica_states.get("RUNNING", 0)

    for text, replicas in steps:
        said.write_text(text)
        deadline = time.monotonic() + 60
        while running() != replicas:
            assert time.monotonic() < deadline, f"{running()} replicas at {text}"
            time.sleep(0.5)
