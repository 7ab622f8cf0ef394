"""What the one node of a local Ray cluster must offer so that every process of the configuration fits on it.

Logical amounts: Ray counts them but binds nothing to them, so a small host can be declared larger than it is.
"""

from __future__ import annotations

from cluster.config import Config
from cluster.errors import PlanError
from cluster.plan.pools import expert_pools

# The engine's placement group and the replica in front of it; Serve's controller, proxies and some room.
_CPUS_PER_ATTENTION = 2
_CPUS_PER_GATEWAY = 1
_CPUS_OF_SERVE = 2


def node_resources(config: Config) -> dict[str, float]:
    """Ray resources ("CPU" and custom ones) of the node."""
    attention, pools = config.attention, expert_pools(config.experts)
    roles = [(attention.placement, attention.replicas), *((p.experts.placement, len(p.slots)) for p in pools)]
    cpus = _CPUS_OF_SERVE + _CPUS_PER_GATEWAY * config.gateway.replicas
    cpus += attention.replicas * max(_CPUS_PER_ATTENTION, _round_up(attention.placement.num_cpus))
    cpus += sum(len(p.slots) * max(1, p.experts.threads, _round_up(p.experts.placement.num_cpus)) for p in pools)
    resources = {"CPU": float(config.ray.num_cpus or cpus)}
    for placement, processes in roles:
        for name, amount in placement.resources.items():
            # Twice: a replacement may start before Serve has let go of the process that it replaces.
            resources[name] = resources.get(name, 0.0) + 2 * amount * processes
    return resources


def node_labels(config: Config) -> dict[str, str]:
    """Ray labels of the node. Raises PlanError when the roles ask for different nodes."""
    labels: dict[str, str] = {}
    pools = expert_pools(config.experts)
    for placement in (config.attention.placement, *(pool.experts.placement for pool in pools)):
        for name, value in placement.labels.items():
            if labels.setdefault(name, value) != value:
                raise PlanError(
                    f"attention and experts ask for nodes with different labels ({name}: {labels[name]} and {value}), "
                    f"but a local cluster has one node: set ray.address to a cluster with such nodes, or drop the label"
                )
    return labels


def _round_up(cpus: float | None) -> int:
    """Whole CPUs for a share of one; 0 for none."""
    return -int(-(cpus or 0.0) // 1)
