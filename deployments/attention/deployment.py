"""How attention replicas are deployed.

Light on purpose: the gateway and whoever builds the application import this module, and only the replicas themselves
import `deployments.attention.replica`, which costs 15 s and 500 MB of vLLM.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.config import Config
from deployments.attention.engine_args import gpus_per_rank
from deployments.hosting.autoscaling import on_wish, serve_autoscaling

NAME = "attention"
REPLICA_CLASS = "deployments.attention.replica.AttentionReplica"


def attention_deployment(config: Config, directory: serve.Application, fixed: bool) -> serve.Application:
    """Return the attention replicas, bound and ready to be passed to the gateway. `fixed`: a Serve configuration file
    sets their number, which it cannot where there is an autoscaling policy.
    """
    bundles = placement_bundles(config)
    labels = dict(config.attention.placement.labels)
    scaling, replicas = config.attention.autoscaling, config.attention.replicas
    policy = None if fixed else on_wish(replicas)
    if scaling is not None:
        policy = serve_autoscaling(scaling, replicas)
    deploy = serve.deployment(
        name=NAME,
        num_replicas=replicas if fixed and scaling is None else None,
        autoscaling_config=policy,
        ray_actor_options={
            "num_cpus": bundles[0]["CPU"],
            "num_gpus": 0,  # GPUs belong to the engine's workers, which take them from the placement group
            "resources": dict(config.attention.placement.resources),
        },
        placement_group_bundles=bundles,
        # One replica never spans nodes: its tensor-parallel ranks share a placement file, and NVLink if there is any.
        placement_group_strategy="STRICT_PACK",
        placement_group_bundle_label_selector=[labels] * len(bundles) if labels else None,
        logging_config=config.logging.of_serve,
        graceful_shutdown_timeout_s=config.stop_within_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=2,
    )
    return deploy(REPLICA_CLASS).bind(config.model_dump_json(), directory)


def placement_bundles(config: Config) -> list[dict[str, float]]:
    """Return the bundles of one replica's placement group: the replica itself and the first rank share the first one.
    """
    attention, placement = config.attention, config.attention.placement
    cpus = 1.0 if placement.num_cpus is None else placement.num_cpus
    first: dict[str, float] = {"CPU": cpus, **placement.resources}
    if attention.device == "cpu":
        return [first]
    gpus = gpus_per_rank(config)
    ranks: list[dict[str, Any]] = [{"GPU": gpus} for _ in range(attention.tensor_parallel_size - 1)]
    return [first | {"GPU": gpus}, *ranks]
