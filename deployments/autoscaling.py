"""How many attention replicas Serve is to run, by what their engines say of themselves.

Serve's own measure, the requests that it routes, is always 0 here: gateways talk to the replicas directly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.config import AttentionAutoscaling

OCCUPANCY = "occupancy"  # of a replica: sequences in its engine, relative to attention.max_num_seqs


def wanted(occupancy: Mapping[str, float], running: int, target: float) -> int:
    """Replicas that would have `target` on average. `occupancy`: of those that have said; the others of the `running`
    ones are taken to be as busy as their average, and nothing changes while none has said.
    """
    if not occupancy:
        return running
    mean = sum(occupancy.values()) / len(occupancy)
    return math.ceil(round(mean * running / target, 6))


class OccupancyPolicy:
    """Serve's autoscaling policy; Serve itself adds bounds and delays."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the number of replicas, and state that the next call gets (none)."""
        said = (context.aggregated_metrics or {}).get(OCCUPANCY, {})
        occupancy = {str(replica): value for replica, value in said.items()}
        return wanted(occupancy, context.current_num_replicas, self._target), {}


def serve_autoscaling(scaling: AttentionAutoscaling, initial: int) -> AutoscalingConfig:
    """Serve's form of it."""
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        initial_replicas=min(max(initial, scaling.min_replicas), scaling.max_replicas),
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function="deployments.autoscaling:OccupancyPolicy",
            policy_kwargs={"target": scaling.target_occupancy},
        ),
    )
