"""Decides where experts should be and how to get there.

A step of the model waits, in every layer, for the slowest worker; so the score is the sum over layers of the greatest
rows / speed of a worker, plus a share of the same after the loss of a host. The rows of an expert with several
replicas are divided among them in any proportion, so a placement is as good as its best division
(`balancing.division`), not as its even one.

Legend: L layers, E experts of a layer, W workers, R the most replicas of one expert.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from routing.tokens.balancing.building import build, copies
from routing.tokens.balancing.division import divide
from routing.tokens.balancing.exchanging import exchange
from routing.tokens.balancing.fleet import Fleet, make_fleet
from routing.tokens.balancing.loss import scored, times_L
from routing.tokens.balancing.moving import Mover, Step
from routing.tokens.balancing.plan import Move, Plan
from routing.tokens.balancing.records import BalanceOptions, Placement, Score, WorkerCapacity
from routing.tokens.balancing.shedding import build_by_shedding
from routing.tokens.balancing.slots import Slots

_DIVISIONS = 60  # rounds, at most, of division where a placement begins or ends
# A new placement is polished by at most so many moves of each layer and rounds of exchanges.
_MOVES, _EXCHANGES = 4, 6
_LEVEL = 0.005  # share of a layer's time that a new placement may be from level


def place(loads_LE: np.ndarray, workers: Sequence[WorkerCapacity], options: BalanceOptions) -> Placement:
    """Return a placement for workers that hold nothing yet.

    `loads_LE`: rows per expert, of any window; a layer without any counts as evenly loaded. Where there is not enough
    room for the floor, the floor is lowered; where there is not even room for every expert, some have no replica.
    Raises ValueError when there are no workers or one has no speed.
    """
    loads_LE = _known(loads_LE)
    held_LW = _nothing(loads_LE, workers)
    fleet = make_fleet(workers, loads_LE.shape[1], options.expert_bytes, options.replica_floor, held_LW)
    slots = Slots.empty(loads_LE, fleet, _most_copies(loads_LE, fleet))
    (build if fleet.alike else build_by_shedding)(slots, fleet)
    divide(slots, fleet.rows_per_s_W, _DIVISIONS)
    mover = Mover(slots, fleet, options.loss_weight)
    mover.mend()
    mover.improve(_MOVES, _LEVEL)
    exchange(slots, fleet, options.loss_weight, _EXCHANGES, _LEVEL)
    divide(slots, fleet.rows_per_s_W, _DIVISIONS)
    return slots.placement()


def score(
    placement: Placement, loads_LE: np.ndarray, workers: Sequence[WorkerCapacity], options: BalanceOptions
) -> Score:
    """Return how good a placement is, with its weights as they are."""
    fleet, slots = _load(placement, _known(loads_LE), workers, options)
    return scored(slots, fleet, options.loss_weight)


def balance(
    loads_LE: np.ndarray, workers: Sequence[WorkerCapacity], current: Placement, options: BalanceOptions
) -> Plan:
    """Return the moves that make the most of `options.budget_bytes`, from `current`, whose workers are indices into
    `workers` (replicas of workers that are gone must be -1 there, at any position).

    Raises ValueError when there are no workers, one has no speed, or holds more than its capacity.
    """
    loads_LE = _known(loads_LE)
    fleet, slots = _load(current, loads_LE, workers, options)
    before = scored(slots, fleet, options.loss_weight)
    divide(slots, fleet.rows_per_s_W, _DIVISIONS)
    time_L = times_L(slots, fleet)
    redivided, start = scored(slots, fleet, options.loss_weight), slots.placement()
    target = slots.of(slots.every_L)
    mover = Mover(slots, fleet, options.loss_weight)
    mover.mend()
    if options.budget_bytes is None or options.budget_bytes >= options.expert_bytes:
        mover.improve(options.rounds, options.least_gain)
    moves = _ordered(mover.steps, options.least_gain * time_L, options)
    for layer, taken in Counter(move.layer for move in moves).items():
        target.take(np.array([layer]), mover.steps[layer][taken - 1].after, np.array([0]))
    after = scored(target, fleet, options.loss_weight)
    worth_it = after.missing < before.missing or after.seconds <= before.seconds * (1 - options.threshold)
    stages = {(layer, n + 1): step.after for layer, taken in enumerate(mover.steps) for n, step in enumerate(taken)}
    return Plan(before, redivided, after, moves, worth_it, start, stages)


def _known(loads_LE: np.ndarray) -> np.ndarray:
    loads_LE = np.asarray(loads_LE, dtype=np.float64)
    if loads_LE.ndim != 2 or not loads_LE.size or not (np.isfinite(loads_LE) & (loads_LE >= 0)).all():
        raise ValueError("loads must be an array [layers, experts] of finite numbers, none below 0")
    return np.where(loads_LE.sum(axis=1, keepdims=True) > 0, loads_LE, 1.0)


def _load(
    placement: Placement, loads_LE: np.ndarray, workers: Sequence[WorkerCapacity], options: BalanceOptions
) -> tuple[Fleet, Slots]:
    """The placement in slots, with its weights; those of replicas that are gone go to the others."""
    workers_LER, weights_LER = placement.workers_LER, placement.weights_LER
    if workers_LER.shape[:2] != loads_LE.shape or workers_LER.max(initial=-1) >= len(workers):
        raise ValueError("the placement is of other layers, experts or workers than the loads and capacities")
    held_LER = workers_LER >= 0
    weights_LER = np.where(held_LER, weights_LER, 0.0)
    total_LE1 = weights_LER.sum(axis=2, keepdims=True)
    even_LER = held_LER / np.maximum(held_LER.sum(axis=2, keepdims=True), 1)
    weights_LER = np.where(total_LE1 > 0, weights_LER / np.where(total_LE1 > 0, total_LE1, 1), even_LER)
    layer_N, expert_N, at_N = np.nonzero(held_LER)
    worker_N = workers_LER[layer_N, expert_N, at_N].astype(np.int64)
    held_LW = _nothing(loads_LE, workers)
    np.add.at(held_LW, (layer_N, worker_N), 1)
    fleet = make_fleet(workers, loads_LE.shape[1], options.expert_bytes, options.replica_floor, held_LW)
    most = max(_most_copies(loads_LE, fleet), int(held_LER.sum(axis=2).max(initial=0)))
    return fleet, Slots.holding(Placement(workers_LER, weights_LER), loads_LE, fleet, most)


def _nothing(loads_LE: np.ndarray, workers: Sequence[WorkerCapacity]) -> np.ndarray:
    return np.zeros((len(loads_LE), len(workers)), dtype=np.int64)


def _most_copies(loads_LE: np.ndarray, fleet: Fleet) -> int:
    """Replicas of one expert for which there is room in the arrays: what evens out the loads, and two more."""
    workers = len(fleet.rows_per_s_W)
    return min(workers, int(copies(loads_LE, fleet, workers).max()) + 2)


def _ordered(steps: Sequence[Sequence[Step]], least_gain_L: np.ndarray, options: BalanceOptions) -> tuple[Move, ...]:
    """Mends first; then as much as the budget takes, in the order of gain per byte.

    A move may pay only together with those after it, so the moves of a layer are cut into blocks of falling mean gain,
    each as long as makes its mean the greatest.
    """
    chosen = [(0 if step.covers else 1, at, layer, step)
              for layer, of_layer in enumerate(steps) for at, step in enumerate(of_layer) if step.mends]  # fmt: skip
    ordered = [(layer, step) for _, _, layer, step in sorted(chosen, key=lambda one: one[:3])]
    blocks: list[tuple[float, int, int, list[Step]]] = []
    for layer, of_layer in enumerate(steps):
        rest = [step for step in of_layer if not step.mends]
        while rest:
            mean_N = np.cumsum([step.gain_s for step in rest]) / np.arange(1, len(rest) + 1)
            length = int(mean_N.argmax()) + 1
            if mean_N[length - 1] < least_gain_L[layer] or mean_N[length - 1] <= 0:
                break
            blocks.append((-float(mean_N[length - 1]), layer, len(blocks), rest[:length]))
            rest = rest[length:]
    left = math.inf if options.budget_bytes is None else options.budget_bytes - len(ordered) * options.expert_bytes
    closed: set[int] = set()
    for _, layer, _, block in sorted(blocks, key=lambda one: one[:3]):
        needed = len(block) * options.expert_bytes
        if layer in closed or needed > left:
            closed.add(layer)
            continue
        left -= needed
        ordered += [(layer, step) for step in block]
    return tuple(
        Move(layer, step.expert, step.worker, step.replaces, options.expert_bytes, step.gain_s, step.mends)
        for layer, step in ordered
    )
