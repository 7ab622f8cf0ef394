"""What a placement costs: the time of its slowest worker, and the same after the worst loss of one host.

Legend: L layers, E experts of a layer, M those with several replicas, R replicas, W workers, D hosts.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.division import several
from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.records import Score
from routing.tokens.balancing.slots import Slots


def times_L(slots: Slots, fleet: Fleet) -> np.ndarray:
    """Seconds of the slowest worker, by layer."""
    return (slots.load_LW() / fleet.rows_per_s_W).max(axis=1)


def loss_times_L(slots: Slots, fleet: Fleet) -> np.ndarray:
    """Seconds of the slowest worker after the loss of one host, by layer: of the host whose loss is worst for it.

    The rows of the lost replicas go to those that are left, in the proportions of their weights, as a table without
    the lost workers divides them before anything is planned anew. Rows of experts that lose all their replicas are
    charged to the slowest worker on top: it never pays to leave them uncovered.
    """
    layers = len(slots.slots_LW)
    if fleet.host_WD.shape[1] == 1:
        return np.zeros(layers)
    load_LW = slots.load_LW()
    lost_LD = load_LW @ fleet.host_WD
    extra_LDW, caught_LD = _caught(slots, fleet)
    time_LDW = (load_LW[:, None, :] + extra_LDW) / fleet.rows_per_s_W
    time_LDW[:, fleet.host_WD.T > 0] = 0
    uncovered_LD = np.maximum(lost_LD - caught_LD, 0)
    return (time_LDW.max(axis=2) + uncovered_LD / fleet.rows_per_s_W.min()).max(axis=1)


def cost_L(slots: Slots, fleet: Fleet, loss_weight: float) -> np.ndarray:
    """Seconds of the score, by layer."""
    return times_L(slots, fleet) + loss_weight * loss_times_L(slots, fleet)


def uneven_L(slots: Slots, fleet: Fleet, share: float) -> np.ndarray:
    """Layers whose slowest worker takes longer than if all were done at once, by more than `share`, bool[L]."""
    ideal_L = slots.loads_LE.sum(axis=1) / fleet.rows_per_s_W.sum()
    return times_L(slots, fleet) > ideal_L * (1 + share)


def _caught(slots: Slots, fleet: Fleet) -> tuple[np.ndarray, np.ndarray]:
    """Rows that each worker takes over when a host is lost [L, D, W], and how many those are in all [L, D]."""
    layers, workers = slots.slots_LW.shape
    hosts = fleet.host_WD.shape[1]
    expert_LM = several(slots)
    if not expert_LM.shape[1]:
        return np.zeros((layers, hosts, workers)), np.zeros((layers, hosts))
    every_L1 = slots.every_L[:, None]
    slot_KR = slots.slot_LER[every_L1, expert_LM].reshape(-1, slots.slot_LER.shape[2])
    copies_K = slots.copies_LE[every_L1, expert_LM].reshape(-1)
    layer_K = np.repeat(slots.every_L, expert_LM.shape[1])
    most = max(2, int(copies_K.max(initial=0)))
    slot_KR = slot_KR[:, :most]
    held_KR = slot_KR != slots.nowhere
    worker_KR = np.where(held_KR, slot_KR // slots.width, 0)
    host_KR = np.where(held_KR, fleet.host_W[worker_KR], -1)
    rows_KR = slots.rows_LP[layer_K[:, None], slot_KR]
    # Replicas without rows take over evenly where no other is left.
    weight_KR = np.where(held_KR, rows_KR + 1e-9 * (rows_KR.sum(axis=1, keepdims=True) + 1e-30), 0.0)
    extra_N, caught_N = np.zeros(layers * hosts * workers), np.zeros(layers * hosts)
    for at in range(most):
        host_K = host_KR[:, at]
        seen_K = (host_KR[:, :at] == host_K[:, None]).any(axis=1)
        gone_KR = host_KR == host_K[:, None]
        left_KR = np.where(gone_KR, 0.0, weight_KR)
        left_K = left_KR.sum(axis=1)
        some_K = np.flatnonzero((host_K >= 0) & ~seen_K & (left_K > 0))
        lost_K = (rows_KR[some_K] * gone_KR[some_K]).sum(axis=1)
        taken_KR = left_KR[some_K] * (lost_K / left_K[some_K])[:, None]
        group_K = layer_K[some_K] * hosts + host_K[some_K]
        caught_N += np.bincount(group_K, lost_K, len(caught_N))
        index_KR = group_K[:, None] * workers + worker_KR[some_K]
        extra_N += np.bincount(index_KR.reshape(-1), taken_KR.reshape(-1), len(extra_N))
    return extra_N.reshape(layers, hosts, workers), caught_N.reshape(layers, hosts)


def missing_LE(slots: Slots, fleet: Fleet) -> np.ndarray:
    """Replicas below the floor, by expert; two in one domain count as one."""
    domain_LER = np.append(fleet.spread_W, -1)[np.minimum(slots.slot_LER // slots.width, len(fleet.spread_W))]
    different_LE = (slots.copies_LE > 0).astype(np.int64)
    if fleet.floor == 1:
        return 1 - different_LE
    for at in range(1, domain_LER.shape[2]):
        new_LE = (domain_LER[:, :, :at] != domain_LER[:, :, at : at + 1]).all(axis=2)
        different_LE += new_LE & (slots.copies_LE > at)
    return np.maximum(0, fleet.floor - different_LE)


def scored(slots: Slots, fleet: Fleet, loss_weight: float) -> Score:
    """Return the score of all layers."""
    time_L, loss_L = times_L(slots, fleet), loss_times_L(slots, fleet)
    ideal_L = slots.load_LW().sum(axis=1) / fleet.rows_per_s_W.sum()
    step_s, loss_s = float(time_L.sum()), float(loss_L.sum())
    balanced = np.divide(ideal_L, time_L, out=np.ones_like(time_L), where=time_L > 0)
    return Score(
        int(missing_LE(slots, fleet).sum()), step_s + loss_weight * loss_s, step_s, loss_s, float(balanced.mean())
    )
