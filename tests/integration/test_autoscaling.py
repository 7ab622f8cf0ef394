"""Serve follows what attention replicas say of themselves; a stand-in says it here."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from cluster.config import AttentionAutoscaling
from deployments.autoscaling import OCCUPANCY, serve_autoscaling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


class Busy:
    """As full as a file says."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {OCCUPANCY: float(self._file.read_text())}


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


def test_serve_follows_what_replicas_say(folder: Path) -> None:
    said = folder / "occupancy"
    said.write_text("0.5")
    scaling = AttentionAutoscaling(max_replicas=3, upscale_delay_s=0, downscale_delay_s=0)
    quick = {"metrics_interval_s": 0.5, "look_back_period_s": 2.0}
    deployment = serve.deployment(
        Busy, name="attention", autoscaling_config=serve_autoscaling(scaling, 1).model_copy(update=quick),
        ray_actor_options={"num_cpus": 0.1},
    )  # fmt: skip
    serve.run(deployment.bind(str(said)), name="app", route_prefix=None)

    def running() -> int:
        return serve.status().applications["app"].deployments["attention"].replica_states.get("RUNNING", 0)

    assert running() == 1
    for occupancy, replicas in (("1.0", 3), ("0.1", 1)):
        said.write_text(occupancy)
        deadline = time.monotonic() + 60
        while running() != replicas:
            assert time.monotonic() < deadline, f"{running()} replicas at {occupancy}"
            time.sleep(0.5)
