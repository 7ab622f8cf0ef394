"""When the experts are worth moving, and where to: the balancer's question put for live expert workers. Pure.

Legend: L MoE layers, E experts of a layer, R replicas of an expert at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from routing.tokens.balancing import BalanceOptions, Placement, Plan, WorkerCapacity, balance
from routing.tokens.membership import WorkerMember

_ALIKE = 1.5  # workers whose speeds differ by a smaller factor are taken to be equally fast: the measure is no better
_SPARED_BYTES = 1 << 30  # of a host's free memory; as much more per worker, or nothing moves


@dataclass(frozen=True)
class RebalanceOptions:
    """What operators set: section `experts.rebalance`, and `experts.replicas_per_expert`."""

    replicas: int
    headroom: float  # a worker may hold so much more than its slot's first share
    budget_bytes: int  # of moves at once
    threshold: float  # part of a step's expert time that moves must save


@dataclass(frozen=True, eq=False)
class Proposal:
    """Where the experts should be. `shares`: bool [L, E]; `weights`: float32 [L, E], part of an expert's rows that the
    worker gets; both by worker id.
    """

    plan: Plan
    moved_bytes: int
    gain: float  # part of a step's expert time that the moves save, beside the best division of rows without them
    worth_it: bool
    shares: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]


def propose(
    tokens_LE: np.ndarray,
    members: Sequence[WorkerMember],
    shares: Mapping[str, np.ndarray],
    first_experts: Mapping[str, int],
    options: RebalanceOptions,
) -> Proposal:
    """Return the best placement that a few moves reach.

    `tokens_LE`: recent tokens per expert. `members`: ready workers that can load and drop experts. `shares`: what each
    is to hold, bool [L, E]; `first_experts`: how many its slot had at first; both by worker id.
    """
    capacities = capacities_of(members, shares, first_experts, options.headroom)
    current = placement_of([shares[member.worker_id] for member in members])
    expert_bytes = max(member.expert_bytes for member in members)
    plan = balance(tokens_LE, capacities, current, _options(options, options.budget_bytes // expert_bytes))
    gain = 1 - plan.after.seconds / plan.redivided.seconds if plan.redivided.seconds else 0.0
    mends = plan.after.missing < plan.before.missing
    target, layers = plan.target, np.arange(len(tokens_LE))[:, None, None]
    experts = np.arange(tokens_LE.shape[1])[None, :, None]
    target_WLE = np.zeros((len(members) + 1, *tokens_LE.shape), dtype=np.float32)  # the last: nobody
    target_WLE[target.workers_LER, layers, experts] = np.maximum(target.weights_LER, 1e-3)
    by_worker = {member.worker_id: target_WLE[at] for at, member in enumerate(members)}
    return Proposal(
        plan,
        len(plan.moves) * expert_bytes,
        gain,
        bool(plan.moves) and (mends or gain >= options.threshold),
        {worker_id: weight_LE > 0 for worker_id, weight_LE in by_worker.items()},
        by_worker,
    )


def step_s(
    tokens_LE: np.ndarray, members: Sequence[WorkerMember], shares: Mapping[str, np.ndarray], options: RebalanceOptions
) -> float:
    """Return the time that the slowest workers of all layers would need for `tokens_LE`, in any unit, with rows divided
    as well as `shares` allow.
    """
    capacities = capacities_of(members, shares, {}, 0.0)
    current = placement_of([shares[member.worker_id] for member in members])
    return balance(tokens_LE, capacities, current, _options(options, 0)).redivided.step_s


def has_room(members: Sequence[WorkerMember]) -> bool:
    """Return whether every worker's host has memory for moves, beside what is left to failover."""
    on_node = Counter(member.node for member in members)
    return all(member.free_bytes > _SPARED_BYTES * (1 + on_node[member.node]) for member in members)


def capacities_of(
    members: Sequence[WorkerMember],
    shares: Mapping[str, np.ndarray],
    first_experts: Mapping[str, int],
    headroom: float,
) -> list[WorkerCapacity]:
    """Return what each worker could hold, in experts rather than bytes, and how fast it is."""
    on_node = Counter(member.node for member in members)
    rates = [member.speed for member in members]
    if min(rates) <= 0 or max(rates) < _ALIKE * min(rates):
        rates = [1.0] * len(members)
    capacities = []
    for member, rate in zip(members, rates, strict=True):
        held = int(shares[member.worker_id].sum())
        room = max(0, member.free_bytes - _SPARED_BYTES) // on_node[member.node] // max(1, member.expert_bytes)
        most = int(first_experts.get(member.worker_id, 0) * (1 + headroom))
        capacity = max(held, min(held + room, most))
        capacities.append(WorkerCapacity(member.worker_id, capacity, rate, member.node, member.zone))
    return capacities


def placement_of(shares: Sequence[np.ndarray]) -> Placement:
    """Return who holds what, rows divided evenly. `shares`: bool [L, E] of each worker."""
    held_LEW = np.stack(shares, axis=2)
    count_LE1 = held_LEW.sum(axis=2, keepdims=True)
    most = max(1, int(count_LE1.max()))
    order_LER = (~held_LEW).argsort(axis=2, kind="stable")[:, :, :most]
    taken_LER = np.arange(most) < count_LE1
    weights_LER = np.where(taken_LER, 1 / np.maximum(count_LE1, 1), 0).astype(np.float32)
    return Placement(np.where(taken_LER, order_LER, -1).astype(np.int16), weights_LER)


def _options(options: RebalanceOptions, budget: int) -> BalanceOptions:
    return BalanceOptions(1, options.replicas, budget_bytes=budget, threshold=options.threshold)
