"""What a configuration would run where, how much memory each process takes, and what crosses the wire. Pure."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.config import Config
from cluster.errors import PlanError
from cluster.model.spec import ModelSpec
from cluster.plan.compute_processes import compute_processes, plan_whole_host
from cluster.plan.cores import CoreShare, HostCores, assign, regular_host
from cluster.plan.fit import Need, place
from cluster.plan.nodes import GIB, NodeSpec
from cluster.plan.pools import expert_pools
from cluster.plan.shares import split_shares
from cluster.plan.step_time import HostSpeed, StepSizes, StepTime, step_times, workers_and_hosts_per_row
from cluster.plan.wire_traffic import DTYPE_BYTES, WireTraffic, expected_workers, wire_traffic

# Resident memory before any weight, measured on CPU hosts: one engine is three processes that import vLLM (3.5 GB);
# a worker imports torch, gRPC and Ray; Ray's own processes, Serve's controller and proxy, directory and gateway.
_ATTENTION_OVERHEAD = int(3.3 * GIB)
_EXPERT_OVERHEAD = int(0.45 * GIB)
_SERVICES_OVERHEAD = int(1.5 * GIB)

_FIXES = {
    "services": "free some memory on the head node",
    "attention": "lower attention.kv_cache_gib or attention.replicas, raise attention.tensor_parallel_size on GPUs, "
    "or add nodes",
    "experts": "add nodes, raise experts.workers so that each holds less, lower experts.replicas_per_expert, or set "
    "experts.dtype: int8",
}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the model, in bytes."""

    name: str
    architecture: str
    dtype: str  # of activations
    moe_layers: int  # MTP layers included
    experts_per_layer: int
    top_k: int
    checkpoint_bytes: int
    expert_bytes_on_disk: int  # one routed expert
    expert_form: str  # in which the workers hold them: a dtype, int8 or fp8
    expert_bytes_in_memory: int  # one routed expert in that form
    attention_weight_bytes: int  # everything but the routed experts, in memory
    kv_bytes_per_token: int


@dataclass(frozen=True)
class WorkerExperts:
    """The share of one expert worker, the same in every layer."""

    worker: str
    experts_per_layer: int
    expert_ids: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All that `deepsplit plan` prints."""

    model: ModelFacts
    processes: tuple[Need, ...]
    workers: tuple[WorkerExperts, ...]
    wire: WireTraffic
    nodes: tuple[NodeSpec, ...]  # empty: not held against any
    kv_cache_tokens: int | None  # per CPU attention replica; None on GPUs
    shortfalls: tuple[str, ...]
    cores: tuple[CoreShare, ...]  # of the processes on nodes whose cores are known
    hosts_per_token: float | None  # expected number of hosts that a token meets per layer; None: hosts are not known
    speed: HostSpeed | None  # that the steps are estimated for
    steps: tuple[StepTime, ...]  # of one attention replica; empty where GPUs compute experts, or no speed is known

    def check(self) -> None:
        """Raises PlanError, with every shortfall and its fix, if something does not fit."""
        if self.shortfalls:
            raise PlanError("the plan does not fit:\n" + "\n".join(f"  {sentence}" for sentence in self.shortfalls))


def make_plan(
    config: Config,
    spec: ModelSpec,
    nodes: Sequence[NodeSpec],
    hosts: Mapping[str, HostCores] | None = None,
    speed: HostSpeed | None = None,
) -> Plan:
    """Raises PlanError when the experts cannot be divided as asked; what does not fit is in `shortfalls`.

    `hosts`: the cores of nodes, by name, where they are known better than from the node's description. `speed`: of each
    host, for an estimate of decode steps.
    """
    model = model_facts(config, spec)
    held = split_shares(spec.num_experts, config.experts.worker_shares(), config.experts.replicas_per_expert)
    kv_bytes = 0 if config.attention.device == "cuda" else int(config.attention.kv_cache_gib * GIB)
    needs = _needs(config, model, kv_bytes, [len(ids) for ids in held], turn_bytes(config, spec))
    shortfalls: tuple[str, ...] = ()
    if nodes:
        needs, shortfalls = place(needs, nodes)
        roles = list(dict.fromkeys(need.role for need in needs if need.node is None))
        shortfalls = tuple(f"{text}; {_FIXES[role]}" for text, role in zip(shortfalls, roles, strict=True))
    decode_layers = len([layer for layer in spec.moe_layers if layer < spec.num_hidden_layers])
    # The one MTP layer runs once per drafted token.
    drafting = config.attention.speculative_tokens if spec.num_mtp_layers else 0
    wire = wire_traffic(
        expected_workers([len(ids) for ids in held], spec.num_experts, spec.top_k, config.experts.replicas_per_expert),
        config.experts.workers,
        spec.hidden_size,
        spec.top_k,
        decode_layers + drafting,
        _dtype(config.dispatch.dispatch_dtype, model.dtype),
        _dtype(config.dispatch.combine_dtype, model.dtype),
    )
    workers = tuple(WorkerExperts(f"experts-{i}", len(ids), ids) for i, ids in enumerate(held))
    tokens = kv_bytes // model.kv_bytes_per_token if kv_bytes else None
    cores = _cores(config, needs, nodes, hosts or {})
    counts = [len(ids) for ids in held]
    # Where no nodes are known, each worker is taken to have a host of its own.
    where = [need.node or need.name for need in needs if need.role == "experts"]
    hosts_met = workers_and_hosts_per_row(
        counts, where, spec.num_experts, spec.top_k, config.experts.replicas_per_expert
    )[1]
    steps = () if speed is None else _steps(config, spec, model, wire, counts, where, speed)
    return Plan(
        model, needs, workers, wire, tuple(nodes), tokens, shortfalls, cores, hosts_met if nodes else None, speed, steps
    )


def _steps(
    config: Config,
    spec: ModelSpec,
    model: ModelFacts,
    wire: WireTraffic,
    counts: Sequence[int],
    where: Sequence[str],
    speed: HostSpeed,
) -> tuple[StepTime, ...]:
    pools = [pool.experts for pool in expert_pools(config.experts) for _ in pool.slots]
    if any(pool.device == "cuda" for pool in pools):
        return ()
    embedding_bytes = spec.vocab_size * spec.hidden_size * DTYPE_BYTES[model.dtype]  # a row of it is read, not all
    sizes = StepSizes(
        attention_bytes=max(0, model.attention_weight_bytes - embedding_bytes),
        attention_params=max(0, spec.attention_params - spec.vocab_size * spec.hidden_size),
        layers=wire.layers,
        experts=spec.num_experts,
        top_k=spec.top_k,
        expert_bytes=model.expert_bytes_in_memory,
        expert_params=spec.expert_params,
        wire_bytes_per_row=wire.dispatch_bytes_per_layer + wire.combine_bytes_per_layer,
        workers_per_row=wire.workers_per_token,
    )
    threads = [pool.threads for pool in pools]
    replicas = config.experts.replicas_per_expert
    gpus = config.attention.tensor_parallel_size if config.attention.device == "cuda" else 0
    return step_times(sizes, counts, replicas, threads, where, config.attention.threads, gpus, speed)


def model_facts(config: Config, spec: ModelSpec) -> ModelFacts:
    """Sizes from config.json and the tensors' names alone."""
    dtype = _dtype(config.model.dtype, spec.dtype)
    drafting = bool(config.attention.speculative_tokens and spec.num_mtp_layers)
    on_disk = spec.expert_bytes("fp8" if spec.expert_quant else spec.dtype)
    form = _expert_form(config, spec, dtype)
    kv_layers = spec.num_hidden_layers + (spec.num_mtp_layers if drafting else 0)
    return ModelFacts(
        name=config.model.served_name,
        architecture=spec.architecture,
        dtype=dtype,
        moe_layers=len(spec.moe_layers),
        experts_per_layer=spec.num_experts,
        top_k=spec.top_k,
        checkpoint_bytes=_attention_bytes(spec, spec.dtype, drafting=bool(spec.num_mtp_layers))
        + on_disk * spec.num_experts * len(spec.moe_layers),
        expert_bytes_on_disk=on_disk,
        expert_form=form,
        expert_bytes_in_memory=spec.expert_bytes(form),
        attention_weight_bytes=_attention_bytes(spec, dtype, drafting, config.attention.device),
        kv_bytes_per_token=_kv_bytes_per_layer(spec, DTYPE_BYTES[dtype], config.attention.device) * kv_layers,
    )


def _expert_form(config: Config, spec: ModelSpec, dtype: str) -> str:
    """As deployments.experts.forms chooses on a host that has vLLM's packed kernel, or a GPU that computes FP8."""
    if config.experts.dtype != "auto":
        return config.experts.dtype
    if spec.expert_quant is None:
        return dtype
    sizes = (spec.hidden_size, spec.moe_intermediate_size)
    fits = tuple(spec.expert_quant.block_shape) == (128, 128) and all(size % 128 == 0 for size in sizes)
    return "fp8" if fits else "bfloat16"


def turn_bytes(config: Config, spec: ModelSpec) -> int:
    """What a worker needs besides its weights to compute `dispatch.batch_rows` rows at once: the rows and their sums,
    and for each pair of row and expert a row, its gate and up halves, their product and an output.
    """
    form = _expert_form(config, spec, _dtype(config.model.dtype, spec.dtype))
    size = DTYPE_BYTES.get(form, 2)  # INT8 and FP8 compute on bfloat16 rows
    pairs_per_row = spec.top_k * (2 * spec.hidden_size + 3 * spec.moe_intermediate_size)
    return config.dispatch.batch_rows * (spec.hidden_size * (size + 4) + pairs_per_row * size)


def _needs(
    config: Config, model: ModelFacts, kv_bytes: int, counts: Sequence[int], expert_turn_bytes: int
) -> tuple[Need, ...]:
    attention = config.attention
    by_slot = [pool.experts for pool in expert_pools(config.experts) for _ in pool.slots]
    needs = [Need("gateway, directory and Ray", "services", 0, 0, _SERVICES_OVERHEAD)]
    needs += [
        Need(
            f"attention-{i}",
            "attention",
            model.attention_weight_bytes,
            kv_bytes,
            _ATTENTION_OVERHEAD,
            gpus=attention.tensor_parallel_size if attention.device == "cuda" else 0,
            labels=attention.placement.labels,
            resources=attention.placement.resources,
        )
        for i in range(attention.replicas)
    ]
    needs += [
        Need(
            f"experts-{i}",
            "experts",
            model.expert_bytes_in_memory * count * model.moe_layers,
            0,
            _EXPERT_OVERHEAD + expert_turn_bytes,
            gpus=max(1, math.ceil(experts.placement.num_gpus or 1)) if experts.device == "cuda" else 0,
            labels=experts.placement.labels,
            resources=experts.placement.resources,
        )
        for i, (count, experts) in enumerate(zip(counts, by_slot, strict=True))
    ]
    return tuple(needs)


def _cores(
    config: Config, needs: Sequence[Need], nodes: Sequence[NodeSpec], hosts: Mapping[str, HostCores]
) -> tuple[CoreShare, ...]:
    """Raises PlanError where a process must have cores of its own and its node has too few."""
    where = {need.name: need.node for need in needs}
    shares: list[CoreShare] = []
    for node in nodes:
        host = hosts.get(node.name)
        if host is None and node.cores is not None:
            host = regular_host(node.cores, node.threads_per_core, node.numa_nodes)
        if host is not None:
            if config.ray.address is None:
                shares += plan_whole_host(config, host).shares
                continue
            here = [process for process in compute_processes(config) if where[process.name] == node.name]
            # On a joined cluster nobody knows at its start who will come to the same host: waiting threads sleep.
            shares += assign(host, here, may_spin=False)
    return tuple(shares)


def _dtype(asked: str, otherwise: str) -> str:
    return otherwise if asked == "auto" else asked


def _attention_bytes(spec: ModelSpec, dtype: str, drafting: bool, device: str | None = None) -> int:
    """Everything but the routed experts. In an FP8 checkpoint the embeddings and heads are not quantised; on CPU the
    rest is dequantised where it does not meet bfloat16 rows. `device`: None on disk.
    """
    params = spec.attention_params + (spec.mtp_attention_params if drafting else 0)
    if spec.expert_quant is None:
        return params * DTYPE_BYTES[dtype]
    plain = 2 * spec.vocab_size * spec.hidden_size * (1 + (spec.num_mtp_layers if drafting else 0))
    linear_bytes = DTYPE_BYTES[dtype] if device == "cpu" and dtype != "bfloat16" else 1
    return (params - plain) * linear_bytes + plain * DTYPE_BYTES[dtype]


def _kv_bytes_per_layer(spec: ModelSpec, value_bytes: int, device: str) -> int:
    """Bytes that one token leaves in one layer's KV cache: MLA's latent and rotary key, or keys and values; with sparse
    attention also the indexer's key, which vLLM holds on GPUs as FP8 with a float32 scale per 128 values.
    """
    raw: Mapping[str, int] = json.loads((spec.path / "config.json").read_text())
    text = raw.get("text_config") or raw
    assert isinstance(text, Mapping)
    if not text.get("kv_lora_rank"):
        heads = int(text["num_attention_heads"])
        width = int(text.get("head_dim") or spec.hidden_size // heads)
        return 2 * int(text.get("num_key_value_heads") or heads) * width * value_bytes
    latent_bytes = (int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])) * value_bytes
    index_width = int(text["index_head_dim"]) if spec.index_topk else 0
    return latent_bytes + (index_width * value_bytes if device == "cpu" else index_width + index_width // 128 * 4)


def to_json(plan: Plan) -> str:
    """The whole plan, sizes in bytes."""
    data = dataclasses.asdict(dataclasses.replace(plan, nodes=()))
    data["nodes"] = [node.model_dump() for node in plan.nodes]
    for process, need in zip(data["processes"], plan.processes, strict=True):
        process |= {"host_bytes": need.host_bytes, "bytes_per_gpu": need.gpu_bytes}
    data["fits"] = None if not plan.nodes else not plan.shortfalls
    return json.dumps(data, indent=2)
