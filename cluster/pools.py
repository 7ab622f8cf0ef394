"""Expert pools: which slots of the placement are for workers on which kind of node."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ExpertsConfig


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
        own = {"device": pool.device, "threads": pool.threads, "placement": pool.placement, "pools": ()}
        made.append(Pool(pool.name, range(first, first + pool.workers), experts.model_copy(update=own)))
        first += pool.workers
    return tuple(made)
