"""The workers as arrays.

Legend: L layers, E experts of a layer, W workers, D failure domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from routing.tokens.balancing.records import WorkerCapacity


@dataclass(frozen=True, eq=False)
class Fleet:
    """Capacities of W workers in L layers, and where they are.

    `spread_W` is the domain of which an expert's replicas must be in different ones: the widest (zone, host, worker)
    in which the floor has room.
    """

    slots_LW: np.ndarray  # int: experts of the layer that the worker may hold
    rows_per_s_W: np.ndarray  # float
    host_W: np.ndarray  # int: index of its host
    spread_W: np.ndarray  # int
    floor: int  # replicas of every expert, not more than there is room for

    @property
    def alike(self) -> bool:
        """Whether all workers have the same speed and the same slots."""
        return bool((self.rows_per_s_W == self.rows_per_s_W[0]).all() and (self.slots_LW == self.slots_LW[:, :1]).all())

    @cached_property
    def host_WD(self) -> np.ndarray:
        """float32: 1 where the worker is on the host."""
        return _one_hot(self.host_W)

    @cached_property
    def spread_WD(self) -> np.ndarray:
        """float32: 1 where the worker is in the domain."""
        return _one_hot(self.spread_W)


def make_fleet(
    workers: Sequence[WorkerCapacity], experts: int, expert_bytes: int, floor: int, held_LW: np.ndarray
) -> Fleet:
    """Divide every worker's memory among the layers. `held_LW`: experts that it holds already, for which it has room.

    Raises ValueError when there is no worker, one of no speed, or one that holds more than its capacity.
    """
    if not workers:
        raise ValueError("there are no workers to place experts on")
    speed_W = np.array([worker.rows_per_s for worker in workers], dtype=np.float64)
    if not (np.isfinite(speed_W) & (speed_W > 0)).all():
        raise ValueError("rows_per_s of every worker must be positive")
    slots_LW, turn = np.zeros_like(held_LW), 0
    for at, worker in enumerate(workers):
        slots = worker.capacity_bytes // expert_bytes
        slots_LW[:, at] = _divide(slots, held_LW[:, at], experts, turn, worker.worker_id)
        turn += slots  # the next one's remainder goes to the layers after this one's
    room = int(slots_LW.sum(axis=1).min()) // experts
    floor = max(1, min(floor, room, len(workers)))
    zone_W = _indices([worker.zone for worker in workers])
    host_W = _indices([f"{worker.zone}/{worker.host}" for worker in workers])
    worker_W = np.arange(len(workers))
    spread_W = next(
        (domain_W for domain_W in (zone_W, host_W) if floor > 1 and _has_room(slots_LW, domain_W, experts, floor)),
        worker_W if floor > 1 else host_W,
    )
    return Fleet(slots_LW, speed_W, host_W, spread_W, floor)


def _divide(slots: int, held_L: np.ndarray, experts: int, turn: int, worker_id: str) -> np.ndarray:
    """Slots of one worker by layer: even, but never fewer than it holds. The rest goes to layers from `turn` on."""
    layers = len(held_L)
    if held_L.sum() > slots:
        raise ValueError(f"worker {worker_id} holds {held_L.sum()} experts and has room for {slots}")
    even_L = slots // layers + ((np.arange(layers) - turn) % layers < slots % layers)
    slots_L = np.minimum(np.maximum(even_L, held_L), experts)
    for _ in range(int(slots_L.sum() - slots)):
        slots_L[np.argmax(slots_L - held_L)] -= 1
    return slots_L


def _indices(labels: Sequence[str]) -> np.ndarray:
    return np.unique(np.array(labels), return_inverse=True)[1].reshape(-1)


def _one_hot(domain_W: np.ndarray) -> np.ndarray:
    return (domain_W[:, None] == np.arange(domain_W.max() + 1)).astype(np.float32)


def _has_room(slots_LW: np.ndarray, domain_W: np.ndarray, experts: int, floor: int) -> bool:
    """Whether every expert finds `floor` domains in every layer: a domain holds each of them once at most."""
    slots_LD = slots_LW @ _one_hot(domain_W)
    return bool((np.minimum(slots_LD, experts).sum(axis=1) >= floor * experts).all())
