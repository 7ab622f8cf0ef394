"""The plan in an operator's words."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.plan.fit import Need, gib
from cluster.plan.plan import Plan


def plan_text(plan: Plan) -> str:
    """Several lines for a terminal."""
    return "\n".join(line.rstrip() for line in _lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    model, wire = plan.model, plan.wire
    yield f"model      {model.name}: {model.architecture}, {gib(model.checkpoint_bytes)} of weights, {model.dtype}"
    yield (
        f"           {model.moe_layers} MoE layers x {model.experts_per_layer} experts, top-{model.top_k}; one expert "
        f"{gib(model.expert_bytes_on_disk)} on disk, {gib(model.expert_bytes_in_memory)} in a worker, as "
        f"{model.expert_form}"
    )
    yield f"           KV cache {model.kv_bytes_per_token} bytes per token" + (
        "" if plan.kv_cache_tokens is None else f", {plan.kv_cache_tokens} tokens per attention replica"
    )
    yield ""
    yield f"{'process':<28}{'node':<18}{'weights':>12}{'KV cache':>14}{'other':>12}{'experts':>22}"
    held = {worker.worker: worker for worker in plan.workers}
    for need in plan.processes:
        worker = held.get(need.name)
        yield (
            f"{need.name:<28}{_where(need, plan):<18}{gib(need.weights_bytes):>12}{_kv(need):>14}"
            f"{gib(need.overhead_bytes):>12}{f'{worker.experts_per_layer} per layer' if worker else '':>22}"
            f"{f'   on {need.gpus} GPU: {gib(need.gpu_bytes)} each' if need.gpus else ''}"
        )
    yield ""
    names = {need.name: need.node for need in plan.processes}
    for position, share in enumerate(plan.cores):
        yield f"{'' if position else 'cores':<11}{share.name:<17}{names[share.name]:<18}{share}"
    if plan.cores:
        yield ""
    yield (
        f"wire       a token meets {wire.workers_per_token:.2f} of {len(plan.workers)} workers per MoE layer "
        f"(expected, uniform routing)"
    )
    if plan.hosts_per_token is not None:
        hosts = len({names[worker.worker] for worker in plan.workers})
        yield (
            f"           and {plan.hosts_per_token:.2f} of {hosts} host(s): rows travel once to each worker, so one "
            f"worker per host sends least"
        )
    yield (
        f"           per token and layer {_kib(wire.dispatch_bytes_per_layer)} out ({wire.dispatch_dtype}), "
        f"{_kib(wire.combine_bytes_per_layer)} back ({wire.combine_dtype})"
    )
    yield (
        f"           per token and step of {wire.layers} layers {_kib(wire.dispatch_bytes_per_step)} out, "
        f"{_kib(wire.combine_bytes_per_step)} back"
    )
    yield ""
    if plan.speed is not None and plan.steps:
        speed = plan.speed
        network = "" if speed.network_gb_per_s is None else f", {speed.network_gb_per_s:.3g} GB/s of network"
        yield (
            f"step       an estimate, for hosts of {speed.cores} cores, {speed.bandwidth_gb_per_s:.0f} GB/s of memory"
            f"{network}; one attention replica, no drafts"
        )
        yield f"{'':<11}{'batch':>6}{'attention':>12}{'experts':>10}{'dispatch':>10}{'step, ms':>10}{'tokens/s':>10}"
        for step in plan.steps:
            parts = "".join(f"{1e3 * part:>10.1f}" for part in (step.experts_s, step.dispatch_s, step.step_s))
            yield (
                f"{'':<11}{step.batch:>6}{1e3 * step.attention_s:>12.1f}{parts}{step.tokens_per_s:>10.1f}  {step.binds}"
            )
        yield ""
    if not plan.nodes:
        yield "fits       not checked: no nodes are known; describe them with --nodes FILE"
    else:
        yield f"fits       {'no' if plan.shortfalls else 'yes'}, on {_nodes(plan)}"


def _where(need: Need, plan: Plan) -> str:
    return need.node or ("does not fit" if plan.nodes else "any")


def _kv(need: Need) -> str:
    if need.gpus and need.role == "attention":
        return "what is left"
    return gib(need.kv_cache_bytes) if need.kv_cache_bytes else "-"


def _nodes(plan: Plan) -> str:
    total = sum(node.memory_gib for node in plan.nodes)
    name = plan.nodes[0].name if len(plan.nodes) == 1 else f"{len(plan.nodes)} nodes"
    return f"{name} with {total:.1f} GiB of memory"


def _kib(amount: float) -> str:
    return f"{amount / 2**20:.2f} MiB" if amount >= 2**20 else f"{amount / 2**10:.1f} KiB"
