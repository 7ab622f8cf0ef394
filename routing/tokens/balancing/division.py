"""Divides the rows of experts among their replicas so that the slowest worker is as fast as can be.

The best division is a balanced flow from experts to their holders: the one that minimises the sum over workers of
rows^2 / speed also minimises the greatest rows / speed (Fujishige, "Lexicographically optimal base of a polymatroid
with respect to a weight vector", 1980). It is approached by exchanges: every expert moves rows from its slowest holder
to its fastest one until the two are level. All experts do so at once, each moving a part: one over the number of
exchanges that its two workers take part in. So no worker ends above the mean of what its exchanges propose, the sum
falls with every round (it is convex), and the greatest time never rises.

Legend: L layers, M experts of a layer with several replicas, R replicas, W workers.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.slots import Slots


def divide(slots: Slots, rows_per_s_W: np.ndarray, rounds: int) -> None:
    """Move rows between replicas in place, `rounds` times."""
    layers, workers = slots.slots_LW.shape
    expert_LM = several(slots)
    if not expert_LM.shape[1]:
        return
    every_L1 = slots.every_L[:, None]
    slot_LMR = slots.slot_LER[every_L1, expert_LM]
    slot_LMR = slot_LMR[:, :, : max(1, int((slot_LMR != slots.nowhere).sum(axis=2).max()))]
    flat_LMR = slot_LMR + every_L1[:, :, None] * (slots.nowhere + 1)
    rows_LMR = slots.rows_LP.reshape(-1)[flat_LMR]
    # One worker more, of no slots, stands for nowhere.
    worker_LMR = slot_LMR // slots.width + every_L1[:, :, None] * (workers + 1)
    nowhere_LMR = slot_LMR == slots.nowhere
    speed_N = np.tile(np.append(rows_per_s_W, 1.0), layers)
    load_N = np.pad(slots.load_LW(), ((0, 0), (0, 1))).reshape(-1)
    worker_KR, rows_KR, away_KR = (of.reshape(-1, of.shape[2]) for of in (worker_LMR, rows_LMR, nowhere_LMR))
    every_K = np.arange(len(worker_KR))
    for _ in range(rounds):
        time_KR = (load_N / speed_N)[worker_KR]
        source_K = np.where(rows_KR > 0, time_KR, -1.0).argmax(axis=1)
        sink_K = np.where(away_KR, np.inf, time_KR).argmin(axis=1)
        from_K, to_K = worker_KR[every_K, source_K], worker_KR[every_K, sink_K]
        level_K = (load_N[from_K] * speed_N[to_K] - load_N[to_K] * speed_N[from_K]) / (speed_N[from_K] + speed_N[to_K])
        moved_K = np.minimum(level_K, rows_KR[every_K, source_K])
        moves_K = moved_K > 1e-9 * load_N[from_K]
        if not moves_K.any():
            break
        both = np.concatenate((from_K[moves_K], to_K[moves_K]))
        exchanges_N = np.bincount(both, minlength=len(load_N))
        moved_K = np.where(moves_K, moved_K / np.maximum(1, np.maximum(exchanges_N[from_K], exchanges_N[to_K])), 0.0)
        rows_KR[every_K, source_K] -= moved_K
        rows_KR[every_K, sink_K] += moved_K
        load_N = load_N + np.bincount(to_K, moved_K, len(load_N)) - np.bincount(from_K, moved_K, len(load_N))
    slots.rows_LP.reshape(-1)[flat_LMR] = rows_LMR
    slots.rows_LP[:, -1] = 0


def several(slots: Slots) -> np.ndarray:
    """Return the experts with several replicas, int[L, M]; layers with fewer are filled up with others."""
    several_LE = slots.copies_LE > 1
    most = int(several_LE.sum(axis=1).max(initial=0))
    return np.argsort(~several_LE, axis=1, kind="stable")[:, :most]
