"""How many attention replicas and expert workers Serve is to run, by what they say of themselves.

Serve's own measure, the requests that it routes, is always 0 here: gateways talk to the replicas directly, and those to
the expert workers. Engines know only what admission let through, so attention replicas also pass on what clients ask
for, which gateways and the common admission tell the directory. The number of expert workers is the directory's
decision (`deployments.directory.expert_autoscaler`), and so is what `deepsplit scale` asks for: Serve follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.config import AttentionAutoscaling

OCCUPANCY = "occupancy"  # of a replica: sequences in its engine, relative to attention.max_num_seqs
DEMAND = "demand"  # attention replicas that would be full with what clients ask for, refused requests included
WISH = "wish"  # processes of this kind that there are to be, as the process heard last from the directory
WISH_VERSION = "wish_version"
_MOST = 10_000  # replicas of one kind, for want of a better bound


def wanted(said: Mapping[str, float], running: int, target: float) -> int:
    """Replicas that would have `target` on average. `said`: by those that have said; the others of the `running` ones
    are taken to be as busy as their average, and nothing changes while none has said.
    """
    if not said:
        return running
    mean = sum(said.values()) / len(said)
    return math.ceil(round(mean * running / target, 6))


class LoadPolicy:
    """Serve's autoscaling policy; Serve itself adds bounds and delays."""

    def __init__(self, target: float) -> None:
        """`target`: mean occupancy."""
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the number of replicas, and state that the next call gets (none)."""
        metrics = context.aggregated_metrics or {}
        by_replica = {str(replica): value for replica, value in metrics.get(OCCUPANCY, {}).items()}
        replicas = wanted(by_replica, context.current_num_replicas, self._target)
        demand = max(metrics.get(DEMAND, {}).values(), default=0.0)  # all say the same, but not at the same time
        return max(replicas, math.ceil(round(demand / self._target, 6))), {}


class WishPolicy:
    """Serve's autoscaling policy: as many replicas as the directory wants."""

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve's interface. Nothing changes while no replica has heard of a wish."""
        raw = context.raw_metrics or {}
        latest: tuple[float, float] = (0.0, context.target_num_replicas)
        for replica, versions in raw.get(WISH_VERSION, {}).items():
            wishes = raw.get(WISH, {}).get(replica, ())
            if versions and wishes:
                latest = max(latest, (versions[-1].value, wishes[-1].value))
        return int(latest[1]), {}


def on_wish(initial: int) -> AutoscalingConfig:
    """Serve's form of it: `initial` replicas until there is a wish."""
    return AutoscalingConfig(
        min_replicas=1,
        max_replicas=_MOST,
        initial_replicas=initial,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function="deployments.hosting.autoscaling:WishPolicy"),
    )


def serve_autoscaling(scaling: AttentionAutoscaling, initial: int) -> AutoscalingConfig:
    """Serve's form of it."""
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        initial_replicas=min(max(initial, scaling.min_replicas), scaling.max_replicas),
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function="deployments.hosting.autoscaling:LoadPolicy",
            policy_kwargs={"target": scaling.target_occupancy},
        ),
    )
