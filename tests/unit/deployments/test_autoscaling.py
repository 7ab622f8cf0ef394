"""How many attention replicas are wanted; and that Serve itself follows."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from pydantic import ValidationError
from ray import serve

from cluster.config import AttentionAutoscaling, Config
from deployments.autoscaling import OCCUPANCY, serve_autoscaling, wanted


@pytest.mark.parametrize(
    ("occupancy", "running", "replicas"),
    [
        ({"a": 0.7}, 1, 1),
        ({"a": 0.71}, 1, 2),
        ({"a": 1.0, "b": 1.0}, 2, 3),
        ({"a": 1.0, "b": 0.0}, 2, 2),
        ({"a": 1.4}, 1, 2),
        ({"a": 0.1, "b": 0.1, "c": 0.1}, 3, 1),
        ({"a": 0.0}, 4, 0),  # Serve keeps it at the bound
        ({"a": 1.0}, 2, 3),  # the other one is new and says nothing yet
        ({}, 3, 3),
    ],
)
def test_wanted(occupancy: dict[str, float], running: int, replicas: int) -> None:
    assert wanted(occupancy, running, target=0.7) == replicas


def test_bounds_must_fit() -> None:
    with pytest.raises(ValidationError, match="below min_replicas"):
        AttentionAutoscaling(min_replicas=3, max_replicas=2)
    values = {"model": {"path": "/m"}, "attention": {"replicas": 9, "autoscaling": {"max_replicas": 4}}}
    with pytest.raises(ValidationError, match=r"set ray\.address"):
        Config.model_validate(values)
    config = Config.model_validate(values | {"ray": {"address": "auto"}})
    scaling = config.attention.autoscaling
    assert scaling is not None
    assert serve_autoscaling(scaling, config.attention.replicas).initial_replicas == 4


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
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}},
        )  # fmt: skip
        serve.start(proxy_location="Disabled")
        yield made
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_leftovers")
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
