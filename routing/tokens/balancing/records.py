"""What balancing takes and returns.

Legend: L layers, E experts of a layer, W workers, R the most replicas of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    rounds: int = 16  # moves of one layer, at most, beside those that the floor asks for


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


@dataclass(frozen=True)
class Move:
    """Load `expert` of `layer` on `worker`. `replaces` is a redundant replica of the same layer that this worker drops
    first because it has no room; None where it has.
    """

    layer: int
    expert: int
    worker: int
    replaces: int | None
    nbytes: int
    gain_s: float  # seconds of the score that it wins; 0 for a replica that only brings an expert to the floor
    mends: bool  # the floor asks for it


@dataclass(frozen=True, eq=False)
class Plan:
    """Moves from one placement to a better one.

    `mends` come first, experts without any replica before all others. The rest goes by gain per byte, the moves of one
    layer in an order that each can build upon. Wherever one stops, no worker holds more than its capacity, no expert is
    below a floor that it had reached, and the score is no worse than before the last move.
    """

    before: Score  # holders and weights as they are
    redivided: Score  # the same holders with the best weights: what is won without loading anything
    after: Score
    moves: tuple[Move, ...]
    worth_it: bool
    start: Placement  # the placement with the best weights, before any move
    stages: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # (layer, n): workers_ER, weights_ER after its n-th

    @property
    def nbytes(self) -> int:
        """Bytes that the moves load."""
        return sum(move.nbytes for move in self.moves)

    @property
    def target(self) -> Placement:
        """The placement after all moves."""
        return self.placement_after(len(self.moves))

    def placement_after(self, count: int) -> Placement:
        """The placement after the first `count` moves, with its weights."""
        workers_LER, weights_LER = self.start.workers_LER.copy(), self.start.weights_LER.copy()
        done: dict[int, int] = {}
        for move in self.moves[:count]:
            done[move.layer] = done.get(move.layer, 0) + 1
        for layer, last in done.items():
            workers_LER[layer], weights_LER[layer] = self.stages[layer, last]
        return Placement(workers_LER, weights_LER)
