"""What a placement costs: the time of its slowest worker, and the same after the worst loss of one host.

Legend: L layers, E experts of a layer, R replicas, W workers, D hosts; N replicas of experts that have several, Q pairs
of them.
"""

from __future__ import annotations

import numpy as np

from routing.tokens.balancing.fleet import Fleet
from routing.tokens.balancing.records import Score
from routing.tokens.balancing.slots import Slots, shared_experts

_TRACE = 1e-9  # rows


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
    layers, workers, hosts = len(slots.loads_LE), *fleet.host_WD.shape
    shared = shared_experts(slots)
    # All pairs of replicas of one expert: `mine` is lost, `other` takes over unless it is lost with it.
    pairs_N = shared.copies_K[shared.expert_N]
    mine_Q = np.repeat(np.arange(len(pairs_N)), pairs_N)
    other_Q = np.arange(len(mine_Q)) - np.repeat(np.cumsum(pairs_N) - pairs_N, pairs_N)
    other_Q += shared.first_K[shared.expert_N[mine_Q]]
    layer_N, worker_N = shared.layer_K[shared.expert_N], shared.slot_N // slots.width
    rows_N, host_N = slots.rows_LP[layer_N, shared.slot_N], fleet.host_W[worker_N]
    together_Q = host_N[mine_Q] == host_N[other_Q]
    with_N = np.bincount(mine_Q, together_Q, len(rows_N))  # replicas on its host, itself included
    lost_N = np.bincount(mine_Q, rows_N[other_Q] * together_Q, len(rows_N)) / with_N  # its part of the host's loss
    mine_Q, other_Q = mine_Q[~together_Q], other_Q[~together_Q]
    weight_Q = rows_N[other_Q] + _TRACE  # replicas without rows take over where no other is left
    left_N = np.bincount(mine_Q, weight_Q, len(rows_N))
    group_N = layer_N * hosts + host_N
    caught_X = np.bincount(group_N, np.where(left_N > 0, lost_N, 0.0), layers * hosts)
    taken_Q = weight_Q * lost_N[mine_Q] / left_N[mine_Q]
    extra_X = np.bincount(group_N[mine_Q] * workers + worker_N[other_Q], taken_Q, layers * hosts * workers)
    return extra_X.reshape(layers, hosts, workers), caught_X.reshape(layers, hosts)


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
