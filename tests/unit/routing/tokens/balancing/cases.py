"""Fleets and loads for the tests of balancing, and a plain way to say what a placement does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from routing.tokens.balancing import Placement, WorkerCapacity

EXPERT_BYTES = 10


def fleet(
    workers: int, slots: int, layers: int, *, per_host: int = 1, hosts_per_zone: int = 100,
    speeds: Sequence[float] = (1,),
) -> list[WorkerCapacity]:
    """Workers with `slots` slots in every layer; `speeds` repeat."""
    return [
        WorkerCapacity(
            f"w{at}", slots * layers * EXPERT_BYTES, speeds[at % len(speeds)], f"h{at // per_host}",
            f"z{at // per_host // hosts_per_zone}",
        )
        for at in range(workers)
    ]  # fmt: skip


def skewed(layers: int, experts: int, seed: int, exponent: float = 0.7) -> np.ndarray:
    """Loads that fall off as a power of the rank, in an order of their own in every layer."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(1e4 / np.arange(1, experts + 1) ** exponent, (layers, 1)), axis=1)


def holders(placement: Placement) -> list[list[set[int]]]:
    """Workers of every expert of every layer. No worker may be named twice."""
    found = []
    for of_layer in placement.workers_LER.tolist():
        named = [[worker for worker in of_expert if worker >= 0] for of_expert in of_layer]
        assert all(len(set(of_expert)) == len(of_expert) for of_expert in named)
        found.append([set(of_expert) for of_expert in named])
    return found


def worker_rows(placement: Placement, loads_LE: np.ndarray, workers: int) -> np.ndarray:
    """Rows of every worker, float[L, W]."""
    rows_LW = np.zeros((len(loads_LE), workers))
    for layer, expert, at in np.argwhere(placement.workers_LER >= 0):
        worker = placement.workers_LER[layer, expert, at]
        rows_LW[layer, worker] += loads_LE[layer, expert] * placement.weights_LER[layer, expert, at]
    return rows_LW


def check(placement: Placement, workers: Sequence[WorkerCapacity], floor: int) -> None:
    """Every expert has `floor` holders, every worker room for what it holds, and weights divide the rows."""
    held = holders(placement)
    for at, worker in enumerate(workers):
        count = sum(at in of_expert for of_layer in held for of_expert in of_layer)
        assert count * EXPERT_BYTES <= worker.capacity_bytes
    assert min(len(of_expert) for of_layer in held for of_expert in of_layer) >= floor
    assert (placement.weights_LER >= 0).all()
    assert (placement.weights_LER[placement.workers_LER < 0] == 0).all()
    np.testing.assert_allclose(placement.weights_LER.sum(axis=2), 1, rtol=1e-5)


def best_time(loads_E: np.ndarray, held: list[set[int]], speeds: Sequence[float]) -> float:
    """The least time of the slowest worker that any division reaches: experts cannot be done before all their holders
    together are done with them, and the worst set of experts decides (Hall's theorem for flows).
    """
    experts = range(len(loads_E))
    return max(
        loads_E[list(some)].sum() / sum(speeds[worker] for worker in set().union(*(held[expert] for expert in some)))
        for size in range(1, len(loads_E) + 1)
        for some in combinations(experts, size)
    )


@st.composite
def situations(draw: st.DrawFn, floors: Sequence[int] = (1, 2)) -> tuple[np.ndarray, list[WorkerCapacity], int]:
    """Loads, workers with room for the floor, and the floor."""
    layers, experts, workers = draw(st.integers(1, 3)), draw(st.integers(2, 12)), draw(st.integers(2, 7))
    floor = min(draw(st.sampled_from(floors)), workers)
    loads_LE = np.array(
        draw(st.lists(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts), min_size=layers,
                      max_size=layers)), dtype=float,
    )  # fmt: skip
    least = -(-floor * experts // workers)
    slots = draw(st.lists(st.integers(least, least + 3), min_size=workers, max_size=workers))
    speeds = draw(st.lists(st.sampled_from([1.0, 1.0, 2.5, 3.0]), min_size=workers, max_size=workers))
    hosts = draw(st.lists(st.integers(0, 3), min_size=workers, max_size=workers))
    return loads_LE, [
        WorkerCapacity(f"w{at}", slots[at] * layers * EXPERT_BYTES, speeds[at], f"h{hosts[at]}", f"z{hosts[at] // 2}")
        for at in range(workers)
    ], floor  # fmt: skip
