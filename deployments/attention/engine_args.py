"""Turns our configuration into vLLM's engine arguments. Reads `config.json`; imports neither vLLM nor Ray.

`config.attention.engine_args` has the last word: a mapping that both sides set is merged key by key, anything else is
replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from cluster.config import Config, Dtype
from cluster.errors import CheckpointError
from cluster.plan.cores import CoreShare, ranges
from cluster.plan.host_cores import this_host
from deployments.hosting.process_cores import waiting_environment

# The routed experts leave the process inside these ops, so no CUDA graph may span them.
REMOTE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")

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
    }
    if attention.max_model_len is not None:
        args["max_model_len"] = attention.max_model_len
    if attention.speculative_tokens:
        args["speculative_config"] = {"method": "mtp", "num_speculative_tokens": attention.speculative_tokens}
    if attention.device == "cpu":
        args = _merge(args, _cpu_args(config))
    elif not attention.engine_args.get("enforce_eager"):
        # Graphs of pieces only: a full graph of a decode step would span the remote experts.
        args["compilation_config"] = {"splitting_ops": [*graph_breaks, *REMOTE_OPS], "cudagraph_mode": "PIECEWISE"}
    return _merge(args, attention.engine_args)


def engine_env(config: Config, share: CoreShare | None = None) -> dict[str, str]:
    """Return the environment of the engine's processes, for the few settings that vLLM takes in no other way.

    `share`: the cores of a CPU replica, all its ranks together. vLLM's own choice of cores is never used: it leaves all
    but one thread per physical core idle and knows nothing of the other processes. Called on the replica's own node,
    whose cores it counts.
    """
    ready = {"VLLM_ENGINE_READY_TIMEOUT_S": str(int(config.ray.start_timeout_s))}
    if config.attention.device != "cpu":
        return ready
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
    return ready | binding | waiting_environment(share is not None and share.spin) | {
        "OMP_NUM_THREADS": str(threads),
        # Some of vLLM's functions are compiled even in eager mode: 40 s of C++ compiler on the first request.
        "TORCH_COMPILE_DISABLE": "1",
    }


def _cpu_args(config: Config) -> dict[str, Any]:
    args: dict[str, Any] = {
        # Compiling would take longer than all the rest of a start; see docs of attention.engine_args to turn it on.
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.attention.kv_cache_gib * 2**30),
    }
    if _hf_config(config.model.path).get("kv_lora_rank"):
        # vLLM's CPU rotary kernel misreads MLA's query in eager mode (0.29 to 0.32): plain torch does it instead.
        args["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
        # With AMX in the CPU vLLM would take its AMX kernel, which fails on float32; the draft model chooses again for
        # itself. Prefix caching and chunked prefill, which this kernel cannot do, vLLM turns off by itself.
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
