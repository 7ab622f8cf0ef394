"""Which of vLLM's arguments `attention.engine_args` may not hold, why, and what to set instead.

What vLLM or the split would refuse minutes later, when the engine starts, is refused when the file is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from cluster.config.vllm_arguments import REASONING_PARSERS, TOOL_PARSERS, VLLM_VERSION, EngineArguments

_NO_RANKS = "the experts are on workers of their own, so there is no data or expert parallelism; use attention.replicas"
_ONE_NODE = "a replica is one node; use attention.tensor_parallel_size, or attention.replicas"
_PRIVATE_PORT = "replicas listen for gateways only"
_OWN_LOGS = "replicas log as the section `logging` says"

# Fix or reason -> arguments that are refused with it, whatever their value.
REFUSED: Mapping[str, tuple[str, ...]] = {
    "use model.path": ("model", "model_weights"),
    "use model.name and model.aliases": ("served_model_name",),
    "use model.dtype": ("dtype",),
    "use attention.tensor_parallel_size": ("tensor_parallel_size",),
    "use attention.max_model_len": ("max_model_len",),
    "use attention.max_num_seqs": ("max_num_seqs", "max_num_active_seqs"),
    "use attention.speculative_tokens, or method and num_speculative_tokens in speculative_config": (
        "spec_method", "spec_model", "spec_tokens",
    ),
    "deepsplit's own loader leaves the routed experts out": ("load_format", "model_loader_extra_config"),
    "deepsplit's own worker names the requests whose rows it sends": ("worker_cls",),
    "the gateway reads config.json and the tokenizer in model.path, and the engine must read the same": (
        "hf_config_path", "tokenizer", "skip_tokenizer_init",
    ),
    "the gateway admits requests by the engine's statistics": ("disable_log_stats",),
    _NO_RANKS: (
        "data_parallel_size", "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local",
        "data_parallel_address", "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb",
        "data_parallel_multi_port_external_lb", "data_parallel_backend", "data_parallel_supervisor_port",
        "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold",
        "disable_nccl_for_dp_synchronization", "enable_expert_parallel", "enable_ep_weight_filter", "enable_eplb",
        "eplb_config", "expert_placement_strategy", "all2all_backend", "enable_elastic_ep", "moe_backend", "enable_dbo",
        "ubatch_size", "dbo_decode_token_threshold", "dbo_prefill_token_threshold", "dp_sync_interval",
        "elastic_ep_max_dp_size",
    ),
    _ONE_NODE: (
        "pipeline_parallel_size", "prefill_context_parallel_size", "nnodes", "node_rank", "master_addr", "master_port",
    ),
    "deepsplit chooses it, by attention.device": ("distributed_executor_backend",),
    f"{_PRIVATE_PORT}; use gateway.host and gateway.port": ("host", "port", "grpc_port", "uds", "root_path"),
    f"{_PRIVATE_PORT}; use gateway.tls and internal_tls": (
        "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "enable_ssl_refresh", "ssl_cert_reqs", "ssl_ciphers",
    ),
    f"{_PRIVATE_PORT}; use gateway.keys_file": ("api_key",),
    f"{_PRIVATE_PORT}; use gateway.cors_origins": (
        "allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers",
    ),
    f"{_PRIVATE_PORT}; use gateway.sse_comment_interval_s": ("sse_keep_alive_interval",),
    f"{_PRIVATE_PORT}; use gateway.max_body_mib": ("h11_max_incomplete_event_size", "h11_max_header_count"),
    _OWN_LOGS: (
        "log_config_file", "logging_config", "log_level", "uvicorn_log_level", "disable_uvicorn_access_log",
        "disable_access_log_for_endpoints",
    ),
}  # fmt: skip

# Refused with this value alone, or on one device alone.
CONDITIONS: tuple[str, ...] = (
    "`enforce_eager` on CPU, with another value than attention.compile says",
    "`kv_cache_memory_bytes` and `gpu_memory_utilization` on CPU",
    "`compilation_config.cudagraph_mode` with full graphs on CUDA",
    "`speculative_config` with `method: mtp`, or with `num_speculative_tokens` beside attention.speculative_tokens",
    "`additional_config.deepsplit`",
    "`tool_call_parser` and `reasoning_parser` with a name that vLLM has no parser for, unless a plugin is set",
    "`enable_auto_tool_choice` without `tool_call_parser`",
    "`logits_processors` beside attention.speculative_tokens",
)


def refusals(
    args: EngineArguments, device: str, compiled: bool, speculative_tokens: int
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is refused of `args`: the path to it, and a message that names the reason and the fix."""
    for fix, names in REFUSED.items():
        yield from (((name,), f"cannot be set here: {fix}") for name in names if name in args)
    yield from _for_the_device(args, device, compiled)
    yield from _while_drafting(args, speculative_tokens)
    yield from _parsers(args)
    if "deepsplit" in args.get("additional_config", {}):
        yield ("additional_config", "deepsplit"), "is what deepsplit tells its own plugin: leave it out"


def _for_the_device(args: EngineArguments, device: str, compiled: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    if device == "cpu":
        if args.get("enforce_eager", not compiled) is compiled:
            yield ("enforce_eager",), f"is set by attention.compile ({str(compiled).lower()}) on CPU: leave it out"
        for name in ("kv_cache_memory_bytes", "gpu_memory_utilization"):
            if name in args:
                yield (name,), "has no effect on CPU: use attention.kv_cache_gib"
    elif "FULL" in str(args.get("compilation_config", {}).get("cudagraph_mode", "")).upper():
        yield ("compilation_config", "cudagraph_mode"), (
            "a full graph would span the calls to the expert workers: set PIECEWISE or NONE, or leave it out"
        )


def _while_drafting(args: EngineArguments, speculative_tokens: int) -> Iterator[tuple[tuple[str, ...], str]]:
    drafting = args.get("speculative_config") or {}
    if drafting.get("method") == "mtp":
        yield ("speculative_config", "method"), "cannot be set here: use attention.speculative_tokens"
    if not speculative_tokens:
        return
    if "num_speculative_tokens" in drafting:
        yield ("speculative_config", "num_speculative_tokens"), (
            f"is set by attention.speculative_tokens ({speculative_tokens}): leave one of the two out"
        )
    if args.get("logits_processors"):
        yield ("logits_processors",), "cannot run while tokens are drafted: set attention.speculative_tokens to 0"


def _parsers(args: EngineArguments) -> Iterator[tuple[tuple[str, ...], str]]:
    tools, reasoning = args.get("tool_call_parser"), args.get("reasoning_parser")
    if tools and not args.get("tool_parser_plugin"):
        yield from _unknown_parser("tool_call_parser", tools, TOOL_PARSERS)
    if reasoning and not args.get("reasoning_parser_plugin"):
        yield from _unknown_parser("reasoning_parser", reasoning, REASONING_PARSERS)
    if args.get("enable_auto_tool_choice") and not tools:
        yield ("enable_auto_tool_choice",), "needs tool_call_parser too (docs/operations.md says which)"


def _unknown_parser(key: str, name: str, known: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
        yield (key,), f"vLLM {VLLM_VERSION} has no parser {name!r}; {meant}"
