"""Turns our configuration into vLLM's engine arguments. Reads `config.json`; imports neither vLLM nor Ray.

`config.attention.engine_args` has the last word: a mapping that both sides set is merged key by key, anything else is
replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from cluster.config import AttentionConfig, Config, Dtype
from cluster.errors import CheckpointError, StartupError
from cluster.model.dialect import load_dialect
from cluster.plan.cores import CoreShare, ranges
from cluster.plan.host_cores import this_host
from deployments.hosting.process_cores import waiting_environment
from routing.tokens.channel import GRPC_ENVIRONMENT

# Hidden states leave the process inside these ops, so no CUDA graph may span them.
REMOTE_OPS = ("deepsplit::dispatch", "deepsplit::collect")

MLA_BACKEND = "CPU_MLA"
WORKER = "deployments.attention.engine_worker.RequestIdsWorker"


def engine_args(
    config: Config, additional: Mapping[str, Any], load_format: str, graph_breaks: Sequence[str]
) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's `AsyncEngineArgs`, without the model's path and name.

    `additional` goes to vLLM's `additional_config` as it is and must survive JSON. `graph_breaks` are the ops at which
    vLLM itself cuts the compiled graph (it wants them all named as soon as one is added). Raises CheckpointError when
    the model has no readable `config.json`.
    """
    attention = config.attention
    args: dict[str, Any] = {
        "dtype": _dtype(config),
        "load_format": load_format,
        "max_num_seqs": attention.max_num_seqs,
        "tensor_parallel_size": attention.tensor_parallel_size,
        "additional_config": dict(additional),
        "worker_cls": WORKER,
        # On GPUs the ranks are Ray actors in the replica's placement group, which vLLM finds by itself. On CPU they
        # are child processes: a rank that is not a replica of its own would count as a second one to Ray.
        "distributed_executor_backend": "mp" if attention.device == "cpu" else "ray",
    }
    if attention.max_model_len is not None:
        args["max_model_len"] = attention.max_model_len
    if attention.speculative_tokens:
        args["speculative_config"] = {"method": "mtp", "num_speculative_tokens": attention.speculative_tokens}
    if attention.device == "cpu":
        args = _merge(args, _cpu_args(config))
    elif not attention.engine_args.get("enforce_eager"):
        # Compiled, without CUDA graphs: no GPU has shown yet that graphs of the pieces between the ops are right.
        args["compilation_config"] = {"splitting_ops": [*graph_breaks, *REMOTE_OPS], "cudagraph_mode": "NONE"}
    return _merge(_dialect_args(config) | args, attention.engine_args)


def _dialect_args(config: Config) -> dict[str, Any]:
    dialect = load_dialect(config.model.path) if config.attention.dialect == "auto" else None
    if dialect is None:
        return {}
    tools = {"enable_auto_tool_choice": True, "tool_call_parser": dialect.tool_parser} if dialect.tool_parser else {}
    return tools | ({"reasoning_parser": dialect.reasoning_parser} if dialect.reasoning_parser else {})


def engine_env(config: Config, share: CoreShare | None = None) -> dict[str, str]:
    """Return the environment of the engine's processes, for the few settings that vLLM takes in no other way.

    `share`: the cores of a CPU replica, all its ranks together. vLLM's own choice of cores is never used: it leaves all
    but one thread per physical core idle and knows nothing of the other processes. Called on the replica's own node,
    whose cores it counts. Raises StartupError if attention.compile cannot work on it.
    """
    # V3.2's architecture would turn on CUDA graphs of vLLM's breakable kind: no GPU has shown our operators in them.
    graphs = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}
    ready = {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.ray.start_timeout_s)), **graphs, **GRPC_ENVIRONMENT}
    if config.attention.device != "cpu":
        return ready | {"VLLM_RAY_PER_WORKER_GPUS": str(gpus_per_rank(config))}
    threads = config.attention.threads or (this_host().worth if share is None else share.threads)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if share is not None and share.pinned:
        ranks = [share.cores[at : at + threads] for at in range(0, len(share.cores), threads)]
        binding = {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(ranges, ranks)),  # heeded where ranks have processes of their own
            # Heeded by OpenMP when the engine loads torch: its threads stay on these cores, those of the loader too.
            "OMP_PLACES": "{" + ",".join(map(str, share.cores)) + "}",
            "OMP_PROC_BIND": "true",
        }
    waiting = waiting_environment(share is not None and share.spin)
    return ready | _compiler_env(config.attention) | binding | waiting | {"OMP_NUM_THREADS": str(threads)}


def _compiler_env(attention: AttentionConfig) -> dict[str, str]:
    if not attention.compile:
        # Some of vLLM's functions are compiled even in eager mode: 40 s of C++ compiler on the first request.
        return {"TORCH_COMPILE_DISABLE": "1"}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise StartupError("attention.compile needs a C++ compiler on the node: install g++, or set it to false")
    cache = attention.compile_cache.expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"attention.compile_cache: {cache} cannot be made ({error.strerror}): set it to another folder"
        ) from None
    # vLLM's own cache (AOT) is off: 0.32 cannot load on CPU what it saved there ('function' object has no attribute
    # 'finalize_loading'). Inductor's cache loads in 3 s what took 23 s to compile.
    return {"VLLM_USE_AOT_COMPILE": "0", "TORCHINDUCTOR_CACHE_DIR": str(cache)}


def gpus_per_rank(config: Config) -> float:
    """Return what one rank takes of a bundle of the replica's placement group, on a CUDA host."""
    gpus = config.attention.placement.num_gpus
    return 1.0 if gpus is None else gpus / config.attention.tensor_parallel_size


def _cpu_args(config: Config) -> dict[str, Any]:
    compiled = config.attention.compile
    args: dict[str, Any] = {
        "enforce_eager": not compiled,
        "kv_cache_memory_bytes": int(config.attention.kv_cache_gib * 2**30),
    }
    if _hf_config(config.model.path).get("kv_lora_rank"):
        if not compiled:
            # vLLM's CPU rotary kernel misreads MLA's query in eager mode (seen with 0.32): plain torch does it instead.
            args["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
        # With AMX in the CPU vLLM would take its AMX kernel, which fails on float32; the draft model chooses again for
        # itself.
        args["attention_config"] = {"backend": MLA_BACKEND}
        args["block_size"] = 16
        if config.attention.speculative_tokens:
            args["speculative_config"] = {"attention_backend": MLA_BACKEND}
    return args


def _dtype(config: Config) -> str:
    """Return `auto` only where the checkpoint names no dtype: vLLM's own `auto` rounds float32 to bfloat16."""
    if config.model.dtype != "auto":
        return config.model.dtype
    hf_config = _hf_config(config.model.path)
    named = str(hf_config.get("dtype") or hf_config.get("torch_dtype"))
    return named if named in get_args(Dtype) else "auto"


def _hf_config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): set model.path to a checkpoint's folder") from error
    return raw.get("text_config") or raw


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        mine = merged.get(key)
        merged[key] = _merge(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged
