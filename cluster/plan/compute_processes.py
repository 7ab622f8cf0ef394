"""The configuration's processes that compute on CPU cores, named as in the plan, and how they share one host."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import Config, ExpertsConfig
from cluster.plan.cores import ComputeProcess, CoreShare, HostCores, assign
from cluster.plan.pools import expert_pools


@dataclass(frozen=True)
class HostPlan:
    """The cores of all processes of a host on which the whole cluster runs."""

    shares: tuple[CoreShare, ...]  # of the compute processes
    light_cores: tuple[int, ...] | None  # to which all other processes are kept; None: they run on every core


def plan_whole_host(config: Config, host: HostCores) -> HostPlan:
    """Threads may spin only where nobody else runs: where the other processes can be kept to what is left. They are if
    that is a core for each gateway and each replica's front end, and one for Ray. Raises PlanError as `assign` does.
    """
    processes = compute_processes(config)
    shares = assign(host, processes)
    taken = {core for share in shares for core in share.cores}
    left = tuple(core for core in host.all if core not in taken)
    alone = bool(shares) and all(share.spin for share in shares)
    if alone and len(left) > config.gateway.replicas + config.attention.replicas:
        return HostPlan(shares, left)
    return HostPlan(assign(host, processes, may_spin=False), None)


def compute_processes(config: Config) -> tuple[ComputeProcess, ...]:
    """All of them, as many as there are at the start."""
    replicas = [attention_process(config, number) for number in range(config.attention.replicas)]
    workers = [expert_process(pool.experts, slot) for pool in expert_pools(config.experts) for slot in pool.slots]
    return tuple(process for process in (*replicas, *workers) if process is not None)


def attention_process(config: Config, number: int = 0) -> ComputeProcess | None:
    """An attention replica, all ranks together; they differ in their number alone. None if it computes on GPUs."""
    attention = config.attention
    if attention.device != "cpu":
        return None
    threads = None if attention.threads is None else attention.threads * attention.tensor_parallel_size
    return ComputeProcess(f"attention-{number}", threads, attention.pin_cores)


def expert_process(experts: ExpertsConfig, slot: int) -> ComputeProcess | None:
    """The expert worker in this slot, with its pool's settings. None if it computes on a GPU."""
    return None if experts.device != "cpu" else ComputeProcess(f"experts-{slot}", experts.threads, experts.pin_cores)
