"""How many attention replicas are wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import AttentionAutoscaling, Config
from deployments.hosting.autoscaling import (
    DEMAND,
    OCCUPANCY,
    WISH,
    WISH_VERSION,
    LoadPolicy,
    WishPolicy,
    serve_autoscaling,
    wanted,
)


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


def test_nothing_changes_while_no_replica_has_said_anything() -> None:
    context: Any = SimpleNamespace(aggregated_metrics={}, current_num_replicas=2)
    assert LoadPolicy(target=0.6)(context) == (2, {})


@pytest.mark.parametrize(
    ("occupancy", "demand", "running", "replicas"),
    [
        (0.7, 1.4, 2, 2),
        (0.4, 1.5, 2, 3),  # engines are half empty, because no more keeps the promised step time
        (0.9, 6.0, 2, 9),  # and clients are refused
        (0.9, 0.0, 2, 3),  # no gateway has said anything yet
        (0.1, 0.3, 4, 1),
    ],
)
def test_what_clients_ask_for_counts_whatever_the_engines_have(
    occupancy: float, demand: float, running: int, replicas: int
) -> None:
    said = {OCCUPANCY: {"a": occupancy, "b": occupancy}, DEMAND: {"a": demand, "b": 0.9 * demand}}
    context: Any = SimpleNamespace(aggregated_metrics=said, current_num_replicas=running)
    assert LoadPolicy(target=0.7)(context) == (replicas, {})


def test_the_newest_wish_counts_whoever_has_heard_of_it() -> None:
    def at(**said: list[float]) -> dict[str, list[Any]]:
        return {replica: [SimpleNamespace(value=value) for value in values] for replica, values in said.items()}

    def wished(raw: dict[str, Any] | None) -> int:
        context: Any = SimpleNamespace(raw_metrics=raw, target_num_replicas=2)
        return WishPolicy()(context)[0]

    assert wished(None) == wished({}) == wished({WISH: {}, WISH_VERSION: {}}) == 2
    assert wished({WISH: at(a=[]), WISH_VERSION: at(a=[])}) == 2
    assert wished({WISH: at(a=[4, 3], b=[4]), WISH_VERSION: at(a=[10, 20], b=[10])}) == 3
    assert wished({WISH: at(a=[4], b=[5]), WISH_VERSION: at(a=[10], b=[30])}) == 5
    assert wished({WISH: at(b=[5]), WISH_VERSION: at(a=[10], b=[5])}) == 5
