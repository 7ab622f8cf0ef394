"""What balancing takes and returns.

Legend: L layers, E experts of a layer, W workers, R the most replicas of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WorkerCapacity:
    """What one worker can take. `host` and `zone` are its failure domains; a host lies in one zone."""

    worker_id: str
    capacity_bytes: int  # memory for experts, all layers together
    rows_per_s: float  # measured: (row, expert) pairs that it computes
    host: str
    zone: str = ""


@dataclass(frozen=True)
class BalanceOptions:
    """What a placement is worth, and what a move may cost."""

    expert_bytes: int
    replica_floor: int = 1  # replicas that every expert has at least, in as many failure domains, where there is room
    loss_weight: float = 0.05  # of the time after the loss of a host, beside the time before it
    budget_bytes: int | None = None  # that moves may load; replicas that the floor asks for are loaded all the same
    threshold: float = 0.03  # share of the score that a plan must win to be worth it
    least_gain: float = 0.002  # share of its layer's time that a move must win
    rounds: int = 12  # moves of one layer, at most, beside those that the floor asks for


@dataclass(frozen=True, eq=False)
class Placement:
    """Who holds what, and who computes how much of it."""

    workers_LER: np.ndarray  # int16: indices of workers, -1 beyond an expert's last replica
    weights_LER: np.ndarray  # float32: share of an expert's rows that this holder computes; they sum to 1 per expert


@dataclass(frozen=True, order=True)
class Score:
    """How good a placement is for given loads: less is better, in the order of the fields."""

    missing: int  # replicas (in different failure domains) below the floor
    seconds: float  # step_s + loss_weight * loss_s
    step_s: float  # sum over layers of the time that the slowest worker needs for its rows
    loss_s: float  # the same after the loss of one host, of each layer's worst; 0 with a single host
    balancedness: float  # mean over layers of mean / max time of a worker; 1 is perfect
