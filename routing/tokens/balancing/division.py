"""Divides the rows of experts among their replicas so that the slowest worker is as fast as can be.

The best division is a balanced flow from experts to their holders: the one that minimises the sum over workers of
rows^2 / speed also minimises the greatest rows / speed (Fujishige, "Lexicographically optimal base of a polymatroid
with respect to a weight vector", 1980). It is approached, not reached, by exchanges: every expert moves rows from its
slowest holder to its fastest one until the two are level. All experts do so at once, each moving a part: one over the
number of exchanges that its two workers take part in. So no worker ends above the mean of what its exchanges propose,
the sum falls with every round (it is convex), and the greatest time never rises.

Legend: L layers, W workers, K experts of all layers that have several replicas, N their replicas.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.slots import Slots, shared_experts

_LEVEL = 1e-5  # share of a worker's rows that is not worth moving
_CHECK, _PROGRESS = 20, 1e-3  # so many rounds must win this share of the slowest workers' time, or the division ends


def divide(slots: Slots, rows_per_s_W: np.ndarray, rounds: int) -> None:
    """Move rows between replicas in place, at most `rounds` times."""
    shared = shared_experts(slots)
    if not len(shared.layer_K):
        return
    layer_N, workers = shared.layer_K[shared.expert_N], len(rows_per_s_W)
    rows_N = slots.rows_LP[layer_N, shared.slot_N]
    worker_N = layer_N * workers + shared.slot_N // slots.width
    speed_X, load_X = np.tile(rows_per_s_W, len(slots.loads_LE)), slots.load_LW().reshape(-1)
    slowest_s = np.inf
    for done in range(rounds):
        if done % _CHECK == 0:
            last_s, slowest_s = slowest_s, (load_X / speed_X).reshape(-1, workers).max(axis=1).sum()
            if slowest_s > last_s * (1 - _PROGRESS):
                break
        time_N = (load_X / speed_X)[worker_N]
        source_K = _first_least(np.where(rows_N > 0, -time_N, 0.0), shared.first_K, shared.expert_N)
        sink_K = _first_least(time_N, shared.first_K, shared.expert_N)
        from_K, to_K = worker_N[source_K], worker_N[sink_K]
        level_K = (load_X[from_K] * speed_X[to_K] - load_X[to_K] * speed_X[from_K]) / (speed_X[from_K] + speed_X[to_K])
        moved_K = np.minimum(level_K, rows_N[source_K])
        moves_K = moved_K > _LEVEL * load_X[from_K]
        if not moves_K.any():
            break
        source_K, sink_K, from_K, to_K = source_K[moves_K], sink_K[moves_K], from_K[moves_K], to_K[moves_K]
        exchanges_X = np.bincount(from_K, minlength=len(load_X)) + np.bincount(to_K, minlength=len(load_X))
        moved_K = moved_K[moves_K] / np.maximum(exchanges_X[from_K], exchanges_X[to_K])
        rows_N[source_K] -= moved_K
        rows_N[sink_K] += moved_K
        load_X = load_X + np.bincount(to_K, moved_K, len(load_X)) - np.bincount(from_K, moved_K, len(load_X))
    slots.rows_LP[layer_N, shared.slot_N] = rows_N


def _first_least(value_N: np.ndarray, first_K: np.ndarray, expert_N: np.ndarray) -> np.ndarray:
    """The replica with the least value of each expert."""
    least_K = np.minimum.reduceat(value_N, first_K)
    every_N = np.arange(len(value_N))
    return np.minimum.reduceat(np.where(value_N == least_K[expert_N], every_N, len(value_N)), first_K)
