"""The one configuration tree: YAML in, frozen objects out, unknown keys rejected.

Every field carries its unit in its name and its meaning in `description`; `docs/configuration.md` is generated from
here. Nothing in deepsplit is tuned by a loose environment variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(_Section):
    """Which checkpoint is served, and as what."""

    path: Path = Field(description="Directory with config.json, safetensors shards (and index) and the tokenizer. "
                                   "A relative path is taken from the configuration file's folder.")
    name: str | None = Field(None, description="Name in /v1/models and in requests; the folder's name if not set.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of activations and unquantised weights; `auto` takes the checkpoint's.")


class NodeSelector(_Section):
    """Where processes of one role may run, in Ray's terms."""

    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each process asks for, such as {expert_host: 1}.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that a node must have, such as {role: experts}.")
    num_cpus: float | None = Field(None, ge=0, description="Ray CPUs that each process asks for.")
    num_gpus: float | None = Field(None, ge=0, description="Ray GPUs that each process asks for.")


class AttentionConfig(_Section):
    """Attention replicas: vLLM engines with everything but the routed experts."""

    replicas: int = Field(1, ge=1, description="Number of attention replicas.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where attention runs.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one replica that share its attention.")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus completion, in tokens; "
                                                              "the model's own bound if not set.")
    max_num_seqs: int = Field(64, ge=1, description="Most sequences in one engine step.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one CPU replica, in GiB. "
                                                       "CUDA replicas size it by gpu_memory_utilization in engine_args.")
    threads: int | None = Field(None, ge=1, description="Compute threads of one CPU replica; all cores if not set.")
    speculative_tokens: int = Field(0, ge=0, description="Tokens drafted per step by the checkpoint's own Multi-Token "
                                                         "Prediction layer; 0 turns speculative decoding off.")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine as they are.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes attention replicas run on.")


class ExpertsConfig(_Section):
    """Expert workers: routed experts only, stateless between calls."""

    workers: int = Field(2, ge=1, description="Number of expert workers.")
    replicas_per_expert: int = Field(1, ge=1, description="How many workers hold each expert (for failover and load).")
    shares: tuple[float, ...] | None = Field(
        None, description="Relative share of the experts per worker, such as [3, 1]; equal shares if not set.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where experts compute.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype that experts compute in; `auto` takes the model's.")
    threads: int = Field(1, ge=1, description="Compute threads of one CPU worker.")
    host: str | None = Field(None, description="Address that workers listen on; loopback on a local cluster, "
                                               "the node's own address on a joined one, if not set.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes expert workers run on.")
    spread: bool = Field(True, description="Spread expert workers over nodes rather than packing them.")
    heartbeat_interval_s: float = Field(0.5, gt=0, description="How often a worker reports to the directory.")
    heartbeat_timeout_s: float = Field(5.0, gt=0, description="Silence after which the directory takes a worker as lost.")


class DispatchConfig(_Section):
    """The token dispatcher between the two halves."""

    dispatch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of hidden states on their way to the experts; `auto` takes the model's.")
    combine_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of expert outputs on their way back; `auto` takes the model's.")
    max_message_mib: int = Field(64, ge=1, le=1024, description="Largest message on the expert plane, in MiB; "
                                                                "longer batches are sent in pieces.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Longest wait for a connection to a worker.")
    call_timeout_s: float = Field(30.0, gt=0, description="Longest wait for one worker's reply before its rows are "
                                                          "sent to another holder.")
    dispatch_timeout_s: float = Field(90.0, gt=0, description="Longest life of one layer's dispatch, retries included.")
    keepalive_interval_s: float = Field(1.0, gt=0, description="How often an idle connection is probed.")
    keepalive_timeout_s: float = Field(2.0, gt=0, description="Silence after a probe that makes a worker lost (hung, or "
                                                              "cut off).")
    lost_worker_pause_s: float = Field(10.0, gt=0, description="How long a lost worker gets no rows while others hold "
                                                               "its experts; a new placement ends the pause.")
    reconnect_interval_s: float = Field(0.2, gt=0, description="How often a lost worker is tried again while nobody "
                                                               "else holds its experts.")
    on_uncovered: Literal["wait", "fail"] = Field(
        "wait", description="When no live worker holds an expert: wait for one, or fail the request.")
    uncovered_timeout_s: float = Field(60.0, ge=0, description="Longest wait for a holder to come back.")


class GatewayConfig(_Section):
    """The one door for clients."""

    host: str = Field("127.0.0.1", description="Address that REST listens on.")
    port: int = Field(8000, ge=0, le=65535, description="REST port.")
    replicas: int = Field(1, ge=1, description="Number of gateway replicas.")
    max_body_mib: int = Field(8, ge=1, description="Largest request body, in MiB.")
    max_ongoing_requests: int = Field(256, ge=1, description="Most requests in flight per gateway replica.")
    request_timeout_s: float = Field(600.0, gt=0, description="Longest life of one request.")


class RayConfig(_Section):
    """The Ray cluster that everything runs on."""

    address: str | None = Field(None, description="Existing cluster to join, such as `auto` or host:port; "
                                                  "a local one is started (and stopped) if not set.")
    num_cpus: int | None = Field(None, ge=1, description="Logical CPUs of a local cluster; what the processes ask for "
                                                         "if not set.")
    start_timeout_s: float = Field(600.0, gt=0, description="Longest wait until everything is ready.")
    stop_timeout_s: float = Field(20.0, gt=0, description="Longest wait for a clean stop before processes are killed.")


class Config(_Section):
    """A whole deployment."""

    model: ModelConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = Field(default_factory=DispatchConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
