"""The configuration's processes that compute on CPU cores, named as in the plan."""

from __future__ import annotations

from cluster.config import Config
from cluster.plan.cores import ComputeProcess
from cluster.plan.pools import Pool, expert_pools


def compute_processes(config: Config) -> tuple[ComputeProcess, ...]:
    """All of them, without redundant workers: a cluster of our own has none."""
    replicas = [attention_process(config, number) for number in range(config.attention.replicas)]
    workers = [expert_process(pool, slot) for pool in expert_pools(config.experts) for slot in pool.slots]
    return tuple(process for process in (*replicas, *workers) if process is not None)


def attention_process(config: Config, number: int = 0) -> ComputeProcess | None:
    """An attention replica, all ranks together; they differ in their number alone. None if it computes on GPUs."""
    attention = config.attention
    if attention.device != "cpu":
        return None
    threads = None if attention.threads is None else attention.threads * attention.tensor_parallel_size
    return ComputeProcess(f"attention-{number}", threads, attention.pin_cores)


def expert_process(pool: Pool, slot: int) -> ComputeProcess | None:
    """The expert worker in this slot. None if it computes on a GPU."""
    experts = pool.experts
    return None if experts.device != "cpu" else ComputeProcess(f"experts-{slot}", experts.threads, experts.pin_cores)
