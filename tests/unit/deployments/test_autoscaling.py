"""How many attention replicas are wanted."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.config import AttentionAutoscaling, Config
from deployments.autoscaling import serve_autoscaling, wanted


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
