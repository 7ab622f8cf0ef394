"""The loads that balancers are compared on.

Legend: N windows of time, L layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

README_LE = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    dtype=np.float64,
)  # the example of github.com/deepseek-ai/EPLB
VECTOR_LE = np.array([[600, 560, 120, 120, 20, 10, 10, 10]], dtype=np.float64)
DEEPSEEK = (58, 256)  # layers and experts of DeepSeek-V3


@dataclass(frozen=True, eq=False)
class Scenario:
    """Loads, and the devices for which a placement is sought."""

    name: str
    loads_LE: np.ndarray
    devices: int
    slots: int  # of one device and layer
    per_host: int
    groups: int = 1  # of experts, and nodes for EPLB's hierarchical policy
    nodes: int = 1


def scenarios(trace_NLE: np.ndarray) -> Iterator[Scenario]:
    """All of them; `trace_NLE`: recorded windows."""
    yield Scenario("README of EPLB, hierarchical", README_LE, 8, 2, 4, groups=4, nodes=2)
    yield Scenario("README of EPLB, global", README_LE, 8, 2, 4)
    yield Scenario("[600, 560, 120, ...]", VECTOR_LE, 8, 2, 1)
    for share in (0.35, 0.45, 0.55):
        loads_LE = skewed(*DEEPSEEK, share, seed=0)
        for devices, slots in ((32, 10), (40, 8)):
            yield Scenario(f"top 10 % have {share:.0%}", loads_LE, devices, slots, 4)
    yield Scenario("recorded, all windows", trace_NLE.sum(axis=0), 8, 3, 2)


def skewed(layers: int, experts: int, share: float, seed: int) -> np.ndarray:
    """Loads of which the top tenth of the experts has `share`: a power of the rank, 20 % of noise, and in every layer
    an order of its own.
    """
    rng = np.random.default_rng(seed)
    noise_LE = rng.uniform(0.8, 1.2, (layers, experts))
    low, high = 0.0, 3.0
    for _ in range(40):
        exponent = (low + high) / 2
        loads_LE = noise_LE / np.arange(1, experts + 1) ** exponent
        top = np.sort(loads_LE, axis=1)[:, -max(1, experts // 10) :].sum() / loads_LE.sum()
        low, high = (exponent, high) if top < share else (low, exponent)
    return rng.permuted(loads_LE / loads_LE.mean(axis=1, keepdims=True) * 1000, axis=1)


def shifted(loads_LE: np.ndarray, seed: int, spread: float = 0.3, changed: float = 0.1) -> np.ndarray:
    """The next window: every load changes by a factor (log-normal, `spread`), and of every layer a share of `changed`
    of the experts exchange theirs.
    """
    rng = np.random.default_rng(seed)
    next_LE = loads_LE * np.exp(rng.normal(0, spread, loads_LE.shape))
    for load_E in next_LE:
        some = rng.choice(len(load_E), int(changed * len(load_E)), replace=False)
        load_E[some] = load_E[rng.permutation(some)]
    return next_LE


def recorded(file: Path) -> np.ndarray:
    """Return tokens per expert as `benchmarks.balance.record` wrote them, float[N, L, E]."""
    with np.load(file) as data:
        return data["loads_NLE"].astype(np.float64)
