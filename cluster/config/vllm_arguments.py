"""The arguments of vLLM that `attention.engine_args` may hold, with their types.

Generated from vLLM 0.32.0 by `make engine-args`; do not edit. `object`: a type whose check is left to vLLM.
"""

from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

VLLM_VERSION = "0.32.0"
TOOL_PARSERS = (
    "apertus", "cohere_command3", "cohere_command4", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4",
    "deepseek_v41", "dots", "ernie45", "functiongemma", "gemma4", "gigachat3", "glm45", "glm47", "granite",
    "granite-20b-fc", "granite4", "hermes", "hf", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "internlm", "jamba",
    "k2_horizon", "kimi_k2", "kimi_k3", "lfm2", "ling3", "llama3_json", "llama4_json", "llama4_pythonic",
    "longcat", "mimo", "minicpm5", "minimax_m2", "minimax_m3", "mistral", "muse_glimmer", "olmo3", "openai",
    "phi4_mini_json", "plamo3", "poolside_v1", "pythonic", "qwen3_coder", "qwen3_json", "qwen3_xml", "seed_oss",
    "step3", "step3p5", "xlam",
)  # fmt: skip
REASONING_PARSERS = (
    "cohere_command3", "cohere_command4", "deepseek_r1", "deepseek_v3", "deepseek_v4", "deepseek_v41", "ernie45",
    "gemma4", "glm45", "glm47", "granite", "granite_thinking_parser", "hf", "holo2", "hunyuan_a13b", "hy_v3",
    "hy_v4", "inkling", "k2_horizon", "kimi_k2", "kimi_k3", "ling3", "mimo", "minicpmv", "minimax_m2",
    "minimax_m2_append_think", "minimax_m3", "mistral", "muse_glimmer", "nemotron_v3", "olmo3", "openai_gptoss",
    "plamo3", "poolside_v1", "qwen3", "seed_oss", "step3", "step3p5",
)  # fmt: skip


@with_config(ConfigDict(extra="forbid", strict=True))
class EngineArguments(TypedDict, total=False):
    """Arguments of vLLM's engine (`AsyncEngineArgs`) and of its OpenAI application (`FrontendArgs`)."""

    additional_config: dict[str, Any]
    aggregate_engine_logging: bool
    all2all_backend: Literal["naive", "pplx", "deepep_high_throughput", "deepep_low_latency", "deepep_v2", "mori_high_throughput", "mori_low_latency", "moonep", "nixl_ep", "allgather_reducescatter", "flashinfer_all2allv", "flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided", "passthrough"]  # noqa: E501
    allow_credentials: bool
    allow_deprecated_quantization: bool
    allowed_headers: list[str]
    allowed_local_media_path: str
    allowed_media_domains: list[str] | None
    allowed_methods: list[str]
    allowed_origins: list[str]
    anthropic_disabled_thinking_effort: Literal["auto", "none", "low", "medium", "high", "xhigh", "max"]
    api_key: list[str] | None
    async_scheduling: bool | None
    attention_backend: str | None
    attention_config: dict[str, Any]
    aux_output_config: dict[str, Any]
    block_size: int | None
    chat_template: str | None
    chat_template_content_format: Literal["auto", "string", "openai"]
    code_revision: str | None
    cohere_format: str
    cohere_is_reasoning_model: bool
    collect_detailed_traces: list[Literal["model", "worker", "all"]] | None
    compilation_config: dict[str, Any]
    config_format: str
    convert: Literal["auto", "none", "embed", "classify"]
    cp_kv_cache_interleave_size: int | None
    cpu_distributed_timeout_seconds: int | None
    cpu_offload_gb: float
    cpu_offload_params: list[str]
    cudagraph_capture_sizes: list[int] | None
    cudagraph_metrics: bool
    custom_histogram_buckets: dict[str, Any] | None
    data_parallel_address: str | None
    data_parallel_backend: Literal["ray", "mp"]
    data_parallel_external_lb: bool
    data_parallel_hybrid_lb: bool
    data_parallel_multi_port_external_lb: bool
    data_parallel_rank: int | None
    data_parallel_rpc_port: int | None
    data_parallel_size: int
    data_parallel_size_local: int | None
    data_parallel_start_rank: int | None
    data_parallel_supervisor_port: int
    dbo_decode_token_threshold: int
    dbo_prefill_token_threshold: int
    dcp_comm_backend: Literal["ag_rs", "a2a"] | None
    dcp_kv_cache_interleave_size: int
    dcp_q_replicate: bool | None
    decode_context_parallel_size: int
    default_chat_template_kwargs: dict[str, Any] | None
    default_mm_loras: dict[str, Any] | None
    device_ids: list[object] | None
    diffusion_config: dict[str, Any] | None
    disable_access_log_for_endpoints: str | None
    disable_cascade_attn: bool | None
    disable_chunked_mm_input: bool
    disable_custom_all_reduce: bool
    disable_fastapi_docs: bool
    disable_hybrid_kv_cache_manager: bool | None
    disable_log_stats: bool
    disable_nccl_for_dp_synchronization: bool | None
    disable_sliding_window: bool
    disable_uvicorn_access_log: bool
    distributed_executor_backend: str | None
    distributed_timeout_seconds: int | None
    download_dir: str | None
    dp_supervisor_probe_failure_threshold: int
    dp_supervisor_probe_interval_s: float
    dp_supervisor_probe_timeout_s: float
    dp_sync_interval: int
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
    ec_manager_config: dict[str, Any]
    ec_transfer_config: dict[str, Any] | None
    elastic_ep_max_dp_size: int
    enable_auto_tool_choice: bool
    enable_batch_sharded_sampling: bool | None
    enable_chunked_prefill: bool | None
    enable_cumem_allocator: bool
    enable_dbo: bool
    enable_elastic_ep: bool
    enable_ep_weight_filter: bool
    enable_eplb: bool
    enable_expert_parallel: bool
    enable_fault_tolerance: bool
    enable_flash_late_interaction: bool
    enable_flashinfer_autotune: bool
    enable_force_include_usage: bool
    enable_hc_sp: bool
    enable_layerwise_nvtx_tracing: bool
    enable_log_deltas: bool
    enable_log_outputs: bool
    enable_log_requests: bool
    enable_logging_iteration_details: bool
    enable_lora: bool
    enable_mamba_cache_stochastic_rounding: bool
    enable_mamba_shared_prefix_checkpoint: bool
    enable_mfu_metrics: bool
    enable_mixed_moe_lora_format: bool
    enable_mm_embeds: bool
    enable_mm_processor_stats: bool
    enable_moe_shared_loras: bool
    enable_nccl_comm_suspend: bool
    enable_offline_docs: bool
    enable_per_request_metrics: bool
    enable_prefix_caching: bool | None
    enable_prompt_embeds: bool
    enable_prompt_tokens_details: bool
    enable_request_id_headers: bool
    enable_return_routed_experts: bool
    enable_scale_out: bool
    enable_server_load_tracking: bool
    enable_shm_tensor_arena: bool
    enable_sleep_mode: bool
    enable_ssl_refresh: bool
    enable_tokenizer_info_endpoint: bool
    enable_tower_connector_lora: bool
    enable_trace_replay: bool
    enforce_eager: bool
    engram_config: dict[str, Any] | None
    eplb_config: dict[str, Any]
    exclude_tools_when_tool_choice_none: bool
    expert_placement_strategy: Literal["linear", "round_robin"]
    fail_on_environ_validation: bool
    fault_tolerance_config: dict[str, Any]
    fingerprint_mode: Literal["full", "hash", "custom", "none"]
    fingerprint_value: str | None
    fully_sharded_loras: bool
    gdn_prefill_backend: Literal["flashinfer", "triton", "cutedsl", "aiter_flydsl"] | None
    generation_config: str
    gpu_memory_utilization: float
    grpc_port: int | None
    h11_max_header_count: int
    h11_max_incomplete_event_size: int
    hf_config_path: str | None
    hf_overrides: dict[str, Any]
    hf_token: object
    host: str | None
    ignore_patterns: object
    interleave_mm_strings: bool
    io_processor_plugin: str | None
    ir_op_priority: dict[str, Any]
    jit_monitor_mode: Literal["warn", "error"]
    jit_monitor_verbose: bool
    kda_decode_backend: Literal["auto", "native", "flashinfer", "triton"] | None
    kda_prefill_backend: Literal["auto", "triton", "flashkda", "flashinfer", "fused"] | None
    kernel_config: dict[str, Any]
    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla", "nvfp4_ds_mla", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc", "ultraquant_4bit", "int4_per_token_head", "int8_per_token_head", "fp8_per_token_head", "nvfp4", "nvfp4_4over6"]  # noqa: E501
    kv_cache_dtype_skip_layers: list[str]
    kv_cache_memory_bytes: int | None
    kv_cache_metrics: bool
    kv_cache_metrics_sample: float
    kv_events_config: dict[str, Any] | None
    kv_offloading_backend: Literal["native", "lmcache"]
    kv_offloading_size: float | None
    kv_sharing_fast_prefill: bool
    kv_transfer_config: dict[str, Any] | None
    language_model_only: bool
    limit_mm_per_prompt: dict[str, Any]
    linear_backend: Literal["auto", "cutlass", "flashinfer_cutlass", "flashinfer_cutedsl", "flashinfer_trtllm", "flashinfer_cudnn", "flashinfer_b12x", "b12x", "marlin", "humming", "triton", "deep_gemm", "torch", "aiter", "machete", "fbgemm", "conch", "exllama", "emulation", "xpu", "xpu_woq"]  # noqa: E501
    load_format: str
    log_config_file: str | None
    log_error_stack: bool
    log_level: Literal["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET"] | None
    logging_config: dict[str, Any] | None
    logits_processors: list[str] | None
    logprobs_mode: Literal["raw_logits", "raw_logprobs", "processed_logits", "processed_logprobs"]
    long_prefill_token_threshold: int
    long_prefill_token_threshold_adaptive: bool
    lora_dtype: str | None
    lora_modules: list[dict[str, Any]] | None
    lora_target_modules: list[str] | None
    mamba_backend: str
    mamba_block_size: int | None
    mamba_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"]
    mamba_cache_mode: Literal["align", "none"]
    mamba_cache_philox_rounds: int
    mamba_config: dict[str, Any]
    mamba_ssm_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"]
    mamba_ssu_algorithm: Literal["auto", "simple", "vertical", "horizontal"] | None
    master_addr: str
    master_port: int
    max_cpu_loras: int | None
    max_cudagraph_capture_size: int | None
    max_log_len: int | None
    max_logprobs: int
    max_lora_cls_labels: int | None
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
    max_loras: int
    max_model_len: int
    max_num_active_seqs: int | None
    max_num_batched_tokens: int | None
    max_num_queued_reqs: int | None
    max_num_queued_tokens: int | None
    max_num_scheduled_tokens: int | None
    max_num_seqs: int | None
    max_parallel_loading_workers: int | None
    media_io_kwargs: dict[str, Any]
    middleware: list[str]
    mm_device_do_normalize: bool | None
    mm_encoder_attn_backend: str | None
    mm_encoder_attn_dtype: str | None
    mm_encoder_fp8_scale_path: str | None
    mm_encoder_fp8_scale_save_margin: float
    mm_encoder_fp8_scale_save_path: str | None
    mm_encoder_only: bool
    mm_encoder_tp_mode: Literal["weights", "data"]
    mm_hasher_algorithm: Literal["blake3", "sha256", "sha512"]
    mm_ipc_gpu_memory_gb: float
    mm_processor_cache_gb: float
    mm_processor_cache_type: Literal["shm", "lru"] | None
    mm_processor_device: str
    mm_processor_kwargs: dict[str, Any] | None
    mm_shm_cache_max_object_size_mb: int
    mm_tensor_ipc: Literal["direct_rpc", "torch_shm"]
    model: str
    model_class_overrides: dict[str, Any]
    model_impl: str
    model_loader_extra_config: dict[str, Any]
    model_weights: str
    moe_backend: Literal["auto", "triton", "batched_triton", "deep_gemm", "deep_gemm_mega_moe", "cutlass", "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl", "flashinfer_moe_ep_cutedsl", "flashinfer_b12x", "b12x", "flashinfer_moe_ep_mega_deep_gemm", "marlin", "humming", "triton_unfused", "aiter", "aiter_mega_moe", "aiter_triton_mxfp4_bf16", "flydsl", "hpc", "emulation", "rdna3"]  # noqa: E501
    nnodes: int
    node_rank: int
    num_gpu_blocks_override: int | None
    numa_bind: bool
    numa_bind_cpus: list[str] | None
    numa_bind_nodes: list[int] | None
    offload_backend: str
    offload_group_size: int
    offload_num_in_group: int
    offload_params: list[str]
    offload_prefetch_step: int
    optimization_level: int
    otlp_traces_endpoint: str | None
    override_generation_config: dict[str, Any]
    per_request_spec_decode_metrics: Literal["none", "summary", "detailed"]
    performance_mode: Literal["balanced", "interactivity", "throughput"]
    pipeline_parallel_size: int
    pooler_config: dict[str, Any] | None
    port: int
    prefill_context_parallel_size: int
    prefill_schedule_interval: int
    prefix_cache_retention_interval: int | None
    prefix_caching_hash_algo: Literal["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]
    prefix_match_unit: int | None
    profiler_config: dict[str, Any]
    pt_load_map_location: object
    quantization: str | None
    quantization_config: object
    ray_workers_use_nsight: bool
    reasoning_config: dict[str, Any]
    reasoning_parser: str
    reasoning_parser_plugin: str | None
    renderer_num_workers: int
    replayssm_buffer_len: int
    response_role: str
    return_sampling_mask: bool
    return_tokens_as_token_ids: bool
    revision: str | None
    root_path: str | None
    runner: Literal["auto", "generate", "pooling", "draft"]
    safetensors_load_strategy: Literal["lazy", "eager", "prefetch", "torchao"] | None
    safetensors_prefetch_block_size: int
    safetensors_prefetch_num_threads: int
    scheduler_cls: str | None
    scheduler_reserve_full_isl: bool
    scheduling_policy: Literal["fcfs", "priority"]
    seed: int
    served_model_name: object
    show_hidden_metrics_for_version: str | None
    shutdown_timeout: int
    skip_mm_profiling: bool
    skip_tokenizer_init: bool
    sleep_mode_offload_cudagraph: bool
    sleep_preserve_parameter_names: list[str]
    sparse_indexer_topk_backend: Literal["auto", "deep_select", "cooperative", "persistent", "per_row", "flashinfer", "torch", "aiter"]  # noqa: E501
    spec_method: str | None
    spec_model: str | None
    spec_tokens: int | None
    specialize_active_lora: bool
    speculative_config: dict[str, Any] | None
    sse_keep_alive_interval: int
    ssl_ca_certs: str | None
    ssl_cert_reqs: int
    ssl_certfile: str | None
    ssl_ciphers: str | None
    ssl_keyfile: str | None
    stream_interval: int
    structured_outputs_config: dict[str, Any]
    swa_bounded_replay: bool
    tensor_parallel_size: int
    tokenizer: str | None
    tokenizer_mode: str
    tokenizer_revision: str | None
    tokens_only: bool
    tool_call_parser: str | None
    tool_parser_plugin: str
    tool_server: str | None
    tool_strict_level: Literal["auto", "function", "parameter"]
    trust_remote_code: bool
    trust_request_chat_template: bool
    trust_request_mm_kwargs: bool
    ubatch_size: int
    uds: str | None
    use_fp64_gumbel: bool
    use_replayssm: bool
    use_tqdm_on_load: bool
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"]
    video_pruning_method: str
    video_pruning_rate: float | None
    watermark: float
    watermark_config: dict[str, Any] | None
    weight_transfer_config: dict[str, Any] | None
    worker_cls: str
    worker_extension_cls: str
