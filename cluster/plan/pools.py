"""Pools of expert workers: which slots of the placement (each the place of one worker) belong to which kind of node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.config import ExpertsConfig, ExpertSpares

_Share = TypeVar("_Share")


@dataclass(frozen=True)
class Pool:
    """Some of the expert workers."""

    name: str  # empty for the only one
    slots: range  # positions in `ExpertsConfig.worker_shares()`
    experts: ExpertsConfig  # with the pool's own device, threads and placement


def expert_pools(experts: ExpertsConfig) -> tuple[Pool, ...]:
    """One per entry of `experts.pools`, in that order; one of all workers if there is none."""
    if not experts.pools:
        return (Pool("", range(experts.workers), experts),)
    made, first = [], 0
    for pool in experts.pools:
        own = {"device": pool.device, "threads": pool.threads, "pin_cores": pool.pin_cores,
               "placement": pool.placement, "spares": pool.spares, "pools": ()}  # fmt: skip
        made.append(Pool(pool.name, range(first, first + pool.workers), experts.model_copy(update=own)))
        first += pool.workers
    return tuple(made)


@dataclass(frozen=True)
class SparePool:
    """Workers that come and go with the load. Each holds the same share as one worker of the pool that they help."""

    pool: Pool  # named and placed like the one that they help, with slots of their own
    helped: range  # slots of that pool
    scaling: ExpertSpares


def spare_pools(experts: ExpertsConfig) -> tuple[SparePool, ...]:
    """The redundant workers of each pool that has some; their slots come after those of all pools."""
    made, first = [], experts.workers
    for pool in expert_pools(experts):
        scaling = pool.experts.spares
        if scaling is not None:
            slots = range(first, first + scaling.max_workers)
            name = f"{pool.name}-spares" if pool.name else "spares"
            made.append(SparePool(Pool(name, slots, pool.experts), pool.slots, scaling))
            first = slots.stop
    return tuple(made)


def with_copies(shares: Sequence[_Share], experts: ExpertsConfig) -> list[_Share]:
    """The share of each slot: `shares` of the workers, then of those that the redundant slots help, in turn."""
    slots = [one.helped[at % len(one.helped)] for one in spare_pools(experts) for at in range(len(one.pool.slots))]
    return [*shares, *(shares[slot] for slot in slots)]
