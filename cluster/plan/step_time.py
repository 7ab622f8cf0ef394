"""How long one decode step would take: an estimate from sizes and the hosts' speeds. Pure.

A step of B sequences is the attention half, which reads its weights once, and for each MoE layer a dispatch and the
experts that its rows meet. Reading and multiplying overlap, so each part takes the longer of bytes over bandwidth and
operations over rate. The constants are measured (docs/performance.md says where), on CPU hosts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.plan.wire_traffic import expected_workers

# benchmarks/expert_kernels.py: the packed kernels reach 43-46 of 74 GB/s, and half of the matrix rate.
_OF_BANDWIDTH, _OF_RATE = 0.6, 0.5
_GPU_BYTES_PER_S = 2e12  # not measured: 0.6 of an H100's data sheet
# benchmarks/split_vs_unsplit.py: what an engine's step takes beside its matrices.
_ENGINE_S, _SEQUENCE_S = 2e-3, 1e-4
# benchmarks/dispatch_latency.py and client_scale.py: a small dispatch, each worker of it, and gRPC's bytes.
_DISPATCH_S, _WORKER_S, _GRPC_BYTES_PER_S = 0.3e-3, 16e-6, 1.9e9
BATCHES = (1, 8, 32, 128)
GFLOP_PER_S = 400.0  # of one core with AVX-512 and bfloat16, measured; AMX has several times as much


@dataclass(frozen=True)
class HostSpeed:
    """One host of each kind of process."""

    cores: int
    bandwidth_gb_per_s: float  # memory, all cores reading
    gflop_per_s: float  # of one core's matrix products in the model's dtype
    network_gb_per_s: float | None  # each way; None: all on one host


@dataclass(frozen=True)
class StepSizes:
    """What a step touches."""

    attention_bytes: int  # read by every step: everything but routed experts and embeddings
    attention_params: int
    layers: int  # MoE layers that a step passes
    experts: int  # of a layer
    top_k: int
    expert_bytes: int
    expert_params: int
    wire_bytes_per_row: float  # of one layer, both ways together
    workers_per_row: float  # expected number of workers that a row meets


@dataclass(frozen=True)
class StepTime:
    """The parts of one step, in seconds."""

    batch: int
    attention_s: float
    experts_s: float
    dispatch_s: float
    binds: str  # what the longest part waits for

    @property
    def step_s(self) -> float:
        """All of it: the parts follow one another."""
        return self.attention_s + self.experts_s + self.dispatch_s

    @property
    def tokens_per_s(self) -> float:
        """Of one attention replica, without drafts."""
        return self.batch / self.step_s


def distinct_experts(experts: int, top_k: int, rows: int) -> float:
    """Expected number of different experts of a layer that `rows` rows meet, E (1 - (1 - K/E)^B): each row meets one
    with the chance K/E, independently of the others, if the router has no preference.
    """
    return experts * (1 - (1 - top_k / experts) ** rows)


def step_times(
    sizes: StepSizes,
    held: Sequence[int],
    replicas: int,
    threads: Sequence[int],
    hosts: Sequence[str],
    attention_threads: int | None,
    attention_gpus: int,
    speed: HostSpeed,
    batches: Sequence[int] = BATCHES,
) -> tuple[StepTime, ...]:
    """Return a step's parts for each batch. `held`: experts per layer of each worker; `threads`: of each worker;
    `hosts`: the name of the host of each. Experts that `replicas` workers hold are divided among them.
    `attention_gpus`: of a replica; 0 on CPU.
    """
    busy: dict[str, int] = {}
    for host, count in zip(hosts, threads, strict=True):
        busy[host] = busy.get(host, 0) + count
    made = []
    for batch in batches:
        if attention_gpus:
            attention_s, attention_binds = sizes.attention_bytes / (attention_gpus * _GPU_BYTES_PER_S), "GPU memory"
        else:
            attention_s, attention_binds = _slower(
                sizes.attention_bytes, 2 * sizes.attention_params * batch, attention_threads or speed.cores, speed,
                (attention_threads or speed.cores) / speed.cores,
            )  # fmt: skip
        met = distinct_experts(sizes.experts, sizes.top_k, batch) / sizes.experts
        layers = [
            _slower(
                met * count / replicas * sizes.expert_bytes,
                2 * sizes.expert_params * batch * sizes.top_k * count / (replicas * sizes.experts), own, speed,
                own / max(speed.cores, busy[host]),
            )
            for count, own, host in zip(held, threads, hosts, strict=True)
        ]  # fmt: skip
        expert_s, expert_binds = max(layers)
        per_s = _GRPC_BYTES_PER_S
        if speed.network_gb_per_s is not None:
            per_s = min(per_s, 1e9 * speed.network_gb_per_s)
        wire_s = batch * sizes.wire_bytes_per_row / per_s
        asked = len(held) * (1 - (1 - sizes.workers_per_row / len(held)) ** batch)
        dispatch_s = sizes.layers * (_DISPATCH_S + _WORKER_S * asked + wire_s)
        parts = {
            f"attention: {attention_binds}": attention_s + _ENGINE_S + batch * _SEQUENCE_S,
            f"experts: {expert_binds}": sizes.layers * expert_s,
            f"dispatch: {'bytes' if wire_s > _DISPATCH_S else 'round trips'}": dispatch_s,
        }
        attention, experts, dispatch = parts.values()
        made.append(StepTime(batch, attention, experts, dispatch, max(parts, key=lambda part: parts[part])))
    return tuple(made)


def _slower(nbytes: float, operations: float, threads: int, speed: HostSpeed, part: float) -> tuple[float, str]:
    """Return seconds and their reason; `part`: of the host's bandwidth, that these threads have."""
    read_s = nbytes / (_OF_BANDWIDTH * 1e9 * speed.bandwidth_gb_per_s * min(1.0, part))
    compute_s = operations / (_OF_RATE * 1e9 * speed.gflop_per_s * threads)
    return (read_s, "memory bandwidth") if read_s >= compute_s else (compute_s, "arithmetic")


def workers_and_hosts_per_row(
    held: Sequence[int], hosts: Sequence[str], experts: int, top_k: int, replicas: int
) -> tuple[float, float]:
    """Return how many workers, and how many hosts, a row is expected to meet. A row travels once to each worker, so the
    difference is what one worker per host would save. See `wire_traffic.expected_workers` for the model.
    """
    by_host: dict[str, int] = {}
    for count, host in zip(held, hosts, strict=True):
        by_host[host] = min(experts * replicas, by_host.get(host, 0) + count)
    return (
        expected_workers(held, experts, top_k, replicas),
        expected_workers([*by_host.values()], experts, top_k, replicas),
    )
