"""Pools of expert workers: which slots of the placement (each the place of one worker) belong to which kind of node."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ExpertAutoscaling, ExpertsConfig


@dataclass(frozen=True)
class Pool:
    """Some of the expert workers."""

    name: str  # empty for the only one
    slots: range  # positions in `ExpertsConfig.worker_shares()`; a pool that grows gets others
    experts: ExpertsConfig  # with the pool's own device, threads and placement
    autoscaling: ExpertAutoscaling | None = None

    @property
    def elastic(self) -> bool:
        """Whether its workers can load and drop experts while they serve, so that there may be more or fewer."""
        return self.experts.device == "cpu" and self.experts.take_over


def expert_pools(experts: ExpertsConfig) -> tuple[Pool, ...]:
    """One per entry of `experts.pools`, in that order; one of all workers if there is none."""
    if not experts.pools:
        return (Pool("", range(experts.workers), experts, experts.autoscaling),)
    made, first = [], 0
    for pool in experts.pools:
        own = {"device": pool.device, "threads": pool.threads, "pin_cores": pool.pin_cores,
               "placement": pool.placement, "pools": ()}  # fmt: skip
        slots = range(first, first + pool.workers)
        made.append(Pool(pool.name, slots, experts.model_copy(update=own), pool.autoscaling))
        first += pool.workers
    return tuple(made)
