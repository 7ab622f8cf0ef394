"""What `validate`, `plan` and `up` check of a model before anything starts. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.keys.file import KeysFile, load_keys
from cluster.model.checkpoint import CheckpointIndex, check_shards, load_checkpoint_index
from cluster.model.dialect import chat_template, dialect_of
from cluster.model.spec import ModelSpec, check_experts, load_model_spec
from cluster.plan.host_cores import this_host
from cluster.plan.local_node import node_labels, node_resources
from cluster.plan.nodes import NodeSpec, load_nodes, this_machine
from cluster.plan.plan import Plan, make_plan
from cluster.plan.shares import split_shares
from cluster.plan.step_time import HostSpeed
from cluster.tls.certificates import KeyPair, load_internal, load_public


def load_model(config: Config) -> tuple[ModelSpec, CheckpointIndex]:
    """Shape and index of the configured model, checked against each other and the configuration.

    Raises CheckpointError, ConfigError or PlanError.
    """
    spec = load_model_spec(config.model.path)
    index = load_checkpoint_index(config.model.path)
    check_experts(index, spec)
    length = config.attention.max_model_len
    if length is not None and spec.max_position_embeddings and length > spec.max_position_embeddings:
        raise ConfigError(
            f"attention.max_model_len is {length}, but the model knows positions up to {spec.max_position_embeddings}: "
            f"lower it"
        )
    if config.attention.speculative_tokens and not spec.num_mtp_layers:
        raise ConfigError(
            "attention.speculative_tokens is set, but the checkpoint has no Multi-Token Prediction layer: set it to 0"
        )
    if config.attention.compile and spec.index_topk and config.attention.device == "cpu":
        raise ConfigError(
            "attention.compile is set, but vLLM does not compile sparse attention (index_topk in config.json) on CPU: "
            "set it to false"
        )
    split_shares(spec.num_experts, config.experts.worker_shares(), config.experts.replicas_per_expert)
    return spec, index


def shards_present(index: CheckpointIndex) -> bool:
    """Whether any of the weights are there: if none are, this is a host that only plans."""
    return any((index.path / shard).exists() for shard in set(index.weight_map.values()))


def validate(config: Config, now_s: float) -> Iterator[str]:
    """Checks everything that can be checked here, saying what. `now_s`: Unix time. Raises at the first fault."""
    yield "configuration: every key known, every value in its range"
    yield from check_files(config, now_s)
    spec, index = load_model(config)
    layers = f"{len(spec.moe_layers)} MoE layers x {spec.num_experts} experts, top-{spec.top_k}"
    sparse = f", sparse attention to {spec.index_topk} tokens" if spec.index_topk else ""
    yield f"model: {spec.architecture}, {layers}, {spec.num_mtp_layers} MTP layer(s){sparse}"
    if (dialect := dialect_of(spec.model_type, chat_template(spec.path))) is not None:
        turned_on = "" if config.attention.dialect == "auto" else " (attention.dialect: auto turns them on)"
        yield f"dialect: {dialect}{turned_on}"
    shards = len(set(index.weight_map.values()))
    yield f"index: {len(index.weight_map)} tensors in {shards} shard(s), every routed expert listed"
    if shards_present(index):
        check_shards(index)
        yield "shards: all there, none truncated"
    else:
        yield "shards: none here, not checked"
    if config.ray.address is None:
        node_labels(config)
        yield "placement: fits one local node"


def check_files(config: Config, now_s: float) -> Iterator[str]:
    """Reads keys and certificates as the processes that use them will, saying what is in them. `now_s`: Unix time.

    On a cluster that is joined they may be mounted only where they are used: what is not here is not checked. Raises
    ConfigError or StartupError.
    """
    keys_file, tls, internal = config.gateway.keys_file, config.gateway.tls, config.internal_tls
    found: list[tuple[str, Path, Callable[[], str]]] = []
    if keys_file is not None:
        found.append(("keys", keys_file, lambda: _tenants(load_keys(keys_file))))
    if tls is not None:
        found.append(("gateway.tls", tls.cert_file, lambda: _expiry(load_public(tls, now_s), now_s)))
    if internal is not None:
        found.append(("internal_tls", internal.cert_file, lambda: _expiry(load_internal(internal, now_s).pair, now_s)))
    for name, path, load in found:
        if config.ray.address is not None and not path.exists():
            yield f"{name}: {path} is not here, not checked"
        else:
            yield f"{name}: {load()}"


def _tenants(file: KeysFile) -> str:
    return f"{sum(len(tenant.keys) for tenant in file.tenants)} key(s) of {len(file.tenants)} tenant(s)"


def _expiry(pair: KeyPair, now_s: float) -> str:
    return f"certificate and key fit, valid for {(pair.not_after_s - now_s) / 86400:.1f} more days"


def plan_for(
    config: Config, spec: ModelSpec, nodes_file: Path | None = None, speed: HostSpeed | None = None
) -> Plan:
    """The plan for the described nodes; else for this machine, if the cluster is to be local; else for none. `speed`:
    of each host, if steps are to be estimated.
    """
    nodes: tuple[NodeSpec, ...] = ()
    if nodes_file is not None:
        nodes = load_nodes(nodes_file)
    elif config.ray.address is None:
        here = this_machine(node_labels(config), node_resources(config))
        return make_plan(config, spec, (here,), {here.name: this_host()}, speed)
    return make_plan(config, spec, nodes, speed=speed)


def check_model(config: Config) -> None:
    """What `up` checks: the model, its shards where they must be, and that all fits. Raises the error tree's leaves."""
    spec, index = load_model(config)
    if config.ray.address is None or shards_present(index):
        check_shards(index)
    plan_for(config, spec).check()
