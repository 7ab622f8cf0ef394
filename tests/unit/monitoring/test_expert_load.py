"""Tokens per expert: exact counts, loads that forget, and how many series there are."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from monitoring.expert_load import TOP, Detail, ExpertLoad
from routing.tokens.routed_tokens import RoutedTokensCounter


class World:
    """An engine's loads on a clock that is set by hand."""

    def __init__(self, num_experts: int = 16, detail: Detail = "top") -> None:
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.counter = RoutedTokensCounter(num_experts)
        self.registry.register(ExpertLoad(self.counter.totals, detail, lambda: self.now_s))

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(sample.labels[key] for key in ("layer", "expert") if key in sample.labels): sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name
        }


def ids(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.int16)


def test_counts_are_exact_and_never_go_back() -> None:
    world = World(4, "full")
    world.counter.record(1, ids((0, 1), (0, 2)))
    world.counter.record(3, ids((3, 2)))
    assert world.samples("deepsplit_layer_routed_tokens_total") == {("1",): 4, ("3",): 2}
    counts = world.samples("deepsplit_expert_tokens_total")
    assert {key: value for key, value in counts.items() if value} == {
        ("1", "0"): 2, ("1", "1"): 1, ("1", "2"): 1, ("3", "2"): 1, ("3", "3"): 1,
    }  # fmt: skip
    world.now_s = 3600
    world.counter.record(1, ids((0, 1)))
    assert world.samples("deepsplit_expert_tokens_total")["1", "0"] == 3


def test_load_and_imbalance_are_relative_to_the_layers_mean() -> None:
    world = World(4)
    world.counter.record(1, ids((0, 1), (0, 2), (0, 3), (0, 1)))
    assert world.samples("deepsplit_layer_imbalance_ratio") == {("1",): 2.0}
    assert world.samples("deepsplit_expert_load_ratio") == {
        ("1", "0"): 2.0, ("1", "1"): 1.0, ("1", "2"): 0.5, ("1", "3"): 0.5,
    }  # fmt: skip


def test_what_was_long_ago_does_not_count() -> None:
    world = World(4)
    world.counter.record(1, ids(*[(0,)] * 100))
    assert world.samples("deepsplit_layer_imbalance_ratio") == {("1",): 4.0}
    world.now_s += 600
    world.counter.record(1, ids((1,), (2,), (3,), (0,)))
    assert world.samples("deepsplit_layer_imbalance_ratio")["1",] == pytest.approx(1.0, abs=0.01)
    world.now_s += 1200
    assert world.samples("deepsplit_layer_imbalance_ratio") == {}  # idle


@pytest.mark.parametrize(("detail", "per_layer"), [("top", TOP), ("full", 2 * 256)])
def test_series_of_a_deepseek_v3(detail: Detail, per_layer: int) -> None:
    world = World(256, detail)
    rng = np.random.default_rng(0)
    for layer in range(3, 61):
        world.counter.record(layer, rng.integers(0, 256, (32, 8)))
    series = sum(len(metric.samples) for metric in world.registry.collect())
    assert series == 58 * (2 + per_layer)


def test_counting_while_somebody_scrapes_loses_nothing() -> None:
    world = World(8, "full")
    counting = threading.Thread(target=lambda: [world.counter.record(1, ids((0, 1))) for _ in range(5000)])
    counting.start()
    while counting.is_alive():
        world.samples("deepsplit_expert_tokens_total")
    assert world.samples("deepsplit_layer_routed_tokens_total") == {("1",): 10_000}
