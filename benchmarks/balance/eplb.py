"""DeepSeek's expert-parallelism load balancer, written anew from its published description: what ours is held against.

Sources: the README of github.com/deepseek-ai/EPLB (its policies, interface and example) and section 3.4 of the
DeepSeek-V3 technical report. Devices are alike, every device holds as many replicas as any other, and the rows of an
expert are divided evenly among its replicas.

Legend: L layers, E experts of a layer, P replicas of all experts of a layer, G devices.
"""

from __future__ import annotations

import heapq

import numpy as np


def eplb(loads_LE: np.ndarray, replicas: int, groups: int, nodes: int, devices: int) -> np.ndarray:
    """Return the expert of every replica, int[L, P]; the first P / G are on device 0, and so on.

    Where the nodes divide the groups of experts, whole groups go to nodes first ("hierarchical"); otherwise experts go
    anywhere ("global").
    """
    if groups % nodes:
        groups = nodes = 1
    return np.stack([_layer(load_E, replicas, groups, nodes, devices) for load_E in np.asarray(loads_LE, float)])


def device_loads(loads_LE: np.ndarray, expert_LP: np.ndarray, devices: int) -> np.ndarray:
    """Rows of each device, float[L, G]."""
    share_LE = loads_LE / np.stack([np.bincount(row, minlength=loads_LE.shape[1]) for row in expert_LP])
    return np.take_along_axis(share_LE, expert_LP, axis=1).reshape(len(expert_LP), devices, -1).sum(axis=2)


def _layer(load_E: np.ndarray, replicas: int, groups: int, nodes: int, devices: int) -> np.ndarray:
    size = len(load_E) // groups
    placed: list[int] = []
    for node_groups in _pack(load_E.reshape(groups, size).sum(axis=1), nodes):
        experts = np.concatenate([np.arange(group * size, (group + 1) * size) for group in node_groups])
        of_node = _replicate(load_E[experts], replicas // nodes)
        share = (load_E[experts] / np.bincount(of_node))[of_node]
        for device in _pack(share, devices // nodes):
            placed += [int(experts[of_node[at]]) for at in device]
    return np.array(placed)


def _replicate(load_E: np.ndarray, replicas: int) -> np.ndarray:
    """The expert of each replica: every expert once, then always the one with the most rows per replica."""
    heap = [(-load, expert, 1) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    experts = list(range(len(load_E)))
    while len(experts) < replicas:
        _, expert, copies = heap[0]
        experts.append(expert)
        heapq.heapreplace(heap, (-load_E[expert] / (copies + 1), expert, copies + 1))
    return np.array(experts)


def _pack(load_N: np.ndarray, packs: int) -> list[list[int]]:
    """Divide items into packs of equally many: the heaviest first, each to the lightest pack that is not full."""
    room = len(load_N) // packs
    members: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-load_N, kind="stable"):
        pack = min((at for at in range(packs) if len(members[at]) < room), key=total.__getitem__)
        members[pack].append(int(item))
        total[pack] += load_N[item]
    return members
