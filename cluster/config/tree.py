"""The one configuration tree: YAML in, frozen objects out, unknown keys rejected.

Every field carries its unit in its name and its meaning in `description`; `docs/configuration.md` is generated from
here. Nothing in deepsplit is tuned by a loose environment variable.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a file that operators write. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, optional or not; None if it holds a value."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def conflict(field: str | tuple[str | int, ...], message: str) -> PydanticCustomError:
    """Error about `field` (or the path to it) of the section that is being validated, because of another key."""
    return PydanticCustomError("conflict", "{message}", {"field": field, "message": message})


class ModelConfig(Section):
    """Which checkpoint is served, and as what."""

    path: Path = Field(description="Directory with config.json, safetensors shards (and index) and the tokenizer. "
                                   "A relative path is taken from the configuration file's folder.")
    name: str | None = Field(None, description="Name in /v1/models and in requests; the folder's name if not set.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of activations and unquantised weights; `auto` takes the checkpoint's.")
    aliases: tuple[str, ...] = Field((), description="More names that requests may use for the one model.")

    @property
    def served_name(self) -> str:
        """The name in /v1/models and in requests."""
        return self.name or self.path.name

    @model_validator(mode="after")
    def _every_alias_is_a_name_of_its_own(self) -> Self:
        for index, alias in enumerate(self.aliases):
            if not alias.strip():
                raise conflict(("aliases", index), "is empty: give a name, or leave it out")
            if alias == self.served_name:
                raise conflict(("aliases", index), f"{alias!r} is the model's name already: leave it out")
            if alias in self.aliases[:index]:
                raise conflict(("aliases", index), f"{alias!r} is listed twice: keep one")
        return self


class NodeSelector(Section):
    """Where processes of one role may run, in Ray's terms."""

    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each process asks for, such as {expert_host: 1}.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that a node must have, such as {role: experts}.")
    num_cpus: float | None = Field(None, ge=0, description="Ray CPUs that each process asks for.")
    num_gpus: float | None = Field(None, ge=0, description="Ray GPUs that each process asks for.")


# The plan and the split read these from their own keys, so there must be one place to set them.
_ENGINE_ARGS_WITH_A_KEY = {
    "model": "use model.path",
    "served_model_name": "use model.name",
    "tensor_parallel_size": "use attention.tensor_parallel_size",
    "load_format": "deepsplit's own loader leaves the routed experts out",
}


class AttentionAutoscaling(Section):
    """Serve sets the number of attention replicas by how full the engines' batches are."""

    min_replicas: int = Field(1, ge=1, description="Fewest replicas.")
    max_replicas: int = Field(ge=1, description="Most replicas.")
    target_occupancy: float = Field(0.7, gt=0, le=1, description="Share of attention.max_num_seqs that a replica is to "
                                                                 "have running on average.")
    upscale_delay_s: float = Field(30.0, ge=0, description="How long more must be wanted before there are more.")
    downscale_delay_s: float = Field(600.0, ge=0, description="How long fewer must be wanted before there are fewer.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise conflict("max_replicas", f"{self.max_replicas} is below min_replicas ({self.min_replicas}): raise it")
        return self


class AttentionConfig(Section):
    """Attention replicas: vLLM engines with everything but the routed experts."""

    replicas: int = Field(1, ge=1, description="Number of attention replicas; with autoscaling, at the start.")
    autoscaling: AttentionAutoscaling | None = Field(None, description="Let the load set the number of replicas, on a "
                                                                       "joined cluster with room for them.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where attention runs.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one replica that share its attention.")
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt plus completion, in tokens; "
                                                              "the model's own bound if not set.")
    max_num_seqs: int = Field(64, ge=1, description="Most sequences in one engine step.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of one CPU replica, in GiB. "
                                                       "CUDA: gpu_memory_utilization in engine_args.")
    threads: int | None = Field(None, ge=1, description="Compute threads of one CPU replica; all cores if not set.")
    speculative_tokens: int = Field(0, ge=0, description="Tokens drafted per step by the checkpoint's own Multi-Token "
                                                         "Prediction layer; 0 turns speculative decoding off.")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="Passed to vLLM's engine as they are.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes attention replicas run on.")

    @model_validator(mode="after")
    def _engine_args_set_nothing_that_has_its_own_key(self) -> Self:
        for name, ours in _ENGINE_ARGS_WITH_A_KEY.items():
            if name in self.engine_args:
                raise conflict("engine_args", f"{name} cannot be set here: {ours}")
        return self


class ExpertSpares(Section):
    """More expert workers while the experts are busy, each with a copy of one worker's share. Serve sets the number."""

    max_workers: int = Field(ge=1, description="Most spare workers; there is always one.")
    target_busy: float = Field(0.6, gt=0, le=1, description="Share of its time that a worker is to compute.")
    upscale_delay_s: float = Field(30.0, ge=0, description="How long more must be wanted before there are more.")
    downscale_delay_s: float = Field(600.0, ge=0, description="How long fewer must be wanted before there are fewer.")


class ExpertPool(Section):
    """Some of the expert workers, on nodes of one kind."""

    name: str = Field(pattern="^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$", description="Name, unique among the pools.")
    workers: int = Field(ge=1, description="Number of its workers.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where its experts compute.")
    threads: int = Field(1, ge=1, description="Compute threads of one of its CPU workers.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes its workers run on.")
    spares: ExpertSpares | None = Field(None, description="More workers while the experts are busy, on a joined "
                                                          "cluster with room for them.")


class ExpertsConfig(Section):
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
    pools: tuple[ExpertPool, ...] = Field((), description="Workers on different kinds of nodes, such as GPU and CPU "
                                                          "hosts side by side.")
    spares: ExpertSpares | None = Field(None, description="More workers while the experts are busy, on a joined "
                                                          "cluster with room for them.")
    max_per_node: int | None = Field(None, ge=1, description="Most expert workers on one node; Ray spreads them over "
                                                             "the nodes as evenly as it can if not set.")
    heartbeat_interval_s: float = Field(1.0, gt=0, description="How often a worker reports to the directory.")
    heartbeat_timeout_s: float = Field(5.0, gt=0, description="Silence after which a worker is taken as lost.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.replicas_per_expert > self.workers:
            raise conflict("replicas_per_expert", f"{self.replicas_per_expert} copies of each expert need as many "
                                                   f"workers, but experts.workers is {self.workers}")
        if self.shares is not None and len(self.shares) != self.workers:
            raise conflict("shares", f"has {len(self.shares)} entries, but experts.workers is {self.workers}: "
                                      f"give one share per worker")
        if self.shares is not None and min(self.shares) <= 0:
            raise conflict("shares", f"every share must be above 0, but they are {list(self.shares)}")
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise conflict("heartbeat_timeout_s", f"must be above experts.heartbeat_interval_s "
                                                   f"({self.heartbeat_interval_s}), or every worker is always lost")
        return self

    @model_validator(mode="after")
    def _pools_are_all_workers(self) -> Self:
        if not self.pools:
            return self
        for name in ("device", "threads", "placement", "spares"):
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise conflict(name, "is set per pool where there are pools: move it into experts.pools")
        total, names = sum(pool.workers for pool in self.pools), {pool.name for pool in self.pools}
        if total != self.workers:
            raise conflict("pools", f"have {total} workers, but experts.workers is {self.workers}: make them equal")
        if len(names) != len(self.pools):
            raise conflict("pools", "two have the same name: give each its own")
        return self

    def worker_shares(self) -> tuple[float, ...]:
        """One share per worker, equal ones if none are set."""
        return self.shares if self.shares is not None else (1.0,) * self.workers


class DispatchConfig(Section):
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
    keepalive_timeout_s: float = Field(2.0, gt=0, description="Silence after a probe that makes a worker lost "
                                                              "(hung, or cut off).")
    lost_worker_pause_s: float = Field(10.0, gt=0, description="How long a lost worker gets no rows while others hold "
                                                               "its experts.")
    reconnect_interval_s: float = Field(0.2, gt=0, description="How often a lost worker is tried again while nobody "
                                                               "else holds its experts.")
    on_uncovered: Literal["wait", "degrade", "fail"] = Field(
        "wait", description="When no live worker holds an expert: wait for one; go on at once without it, with the "
                            "weights of a token's other experts scaled up (a token with none left waits); or fail at "
                            "once (the engine's requests fail, and it restarts).")
    uncovered_timeout_s: float = Field(60.0, ge=0, description="Longest wait for a holder to come back.")


# An Origin header is compared as text: a default port or a slash in the list would match no browser.
_ORIGIN = re.compile(r"(?!http://[^/]*:80$)(?!https://[^/]*:443$)[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


class ServerTls(Section):
    """The certificate that a server shows its clients. Files that change are read again for new connections."""

    cert_file: Path = Field(description="Certificate chain, PEM.")
    key_file: Path = Field(description="Private key, PEM.")


class GatewayConfig(Section):
    """The one door for clients: REST and gRPC."""

    host: str = Field("127.0.0.1", description="Address that REST and gRPC listen on.")
    port: int = Field(8000, ge=1, le=65535, description="REST port.")
    grpc_port: int | None = Field(9000, ge=1, le=65535, description="gRPC port; null turns gRPC off.")
    replicas: int = Field(1, ge=1, description="Number of gateway replicas; those on one node share its ports.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes gateway replicas run on; "
                                                                              "Ray's head node if not set.")
    tls: ServerTls | None = Field(None, description="Serve REST and gRPC over TLS.")
    keys_file: Path | None = Field(None, description="Tenants and the hashes of their API keys (docs/operations.md); "
                                                     "read again when it changes. Without it there are no keys.")
    allow_anonymous: bool = Field(False, description="Listen beyond loopback without API keys.")
    max_body_mib: int = Field(8, ge=1, description="Largest request body, in MiB.")
    max_bodies_mib: int = Field(512, ge=1, description="Most memory of request bodies that one gateway replica holds "
                                                       "at once, in MiB; requests beyond it are refused as overload.")
    max_sequences: int = Field(256, ge=1, description="Most sequences of one request: `n` times its prompts.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longest prompt, in tokens; the engine's own bound "
                                                                  "if not set.")
    max_streams: int = Field(1024, ge=1, description="Most requests in flight per gateway replica, waiting ones "
                                                     "included.")
    request_timeout_s: float = Field(600.0, gt=0, description="Longest life of one request.")
    idle_timeout_s: float = Field(150.0, gt=0, description="How long an HTTP connection stays open between requests.")
    first_request_timeout_s: float = Field(60.0, gt=0, description="How long an HTTP connection may stay without a "
                                                                   "first request.")
    write_stall_s: float = Field(30.0, gt=0, description="How long a client may read nothing of its answer before it "
                                                         "is given up.")
    stream_idle_timeout_s: float = Field(300.0, gt=0, description="How long an Open Inference Protocol "
                                                                  "`ModelStreamInfer` call may stay open while nothing "
                                                                  "is asked or answered on it.")
    connection_max_age_s: float = Field(3600.0, gt=0, description="Age at which a gRPC connection is ended gracefully: "
                                                                  "calls on it finish, and a load balancer places the "
                                                                  "next one anew.")
    sse_comment_interval_s: float | None = Field(
        15.0, gt=0, description="How often a stream that waits or prefills sends a comment, which keeps proxies from "
                                "closing it; null turns comments off.")
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins of browser pages that may call the REST API, such as [https://chat.example.com]; "
                        "[\"*\"] for all. None by default.")
    drain_timeout_s: float = Field(30.0, ge=0, description="How long a stopping gateway lets running requests end "
                                                           "before it ends them with an error.")
    replica_timeout_s: float = Field(5.0, gt=0, description="Silence after which an attention replica is taken as lost "
                                                            "(hung, or cut off).")
    max_resends: int = Field(2, ge=0, description="How often one request may be sent to another attention replica "
                                                  "after the one that had it was lost.")

    @model_validator(mode="after")
    def _is_not_open_to_the_world(self) -> Self:
        if not (self.keys_file or self.allow_anonymous or _is_loopback(self.host)):
            raise conflict("host", f"{self.host} can be reached from other machines, but there are no API keys: set "
                                    "gateway.keys_file (`deepsplit key new` makes a key), or "
                                    "gateway.allow_anonymous: true if everybody may use it")
        if self.grpc_port == self.port:
            raise conflict("grpc_port", f"is gateway.port ({self.port}) too; each needs a port of its own")
        return self

    @model_validator(mode="after")
    def _holds_the_largest_body(self) -> Self:
        if self.max_bodies_mib < self.max_body_mib:
            raise conflict("max_bodies_mib", f"{self.max_bodies_mib} is below gateway.max_body_mib "
                                              f"({self.max_body_mib}), so the largest body would never be read: raise "
                                              "it, or lower gateway.max_body_mib")
        return self

    @model_validator(mode="after")
    def _origins_are_as_browsers_send_them(self) -> Self:
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise conflict("cors_origins", '"*" allows every origin: leave the others out, or "*"')
        for index, origin in enumerate(self.cors_origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise conflict(("cors_origins", index), f"{origin!r} is not an origin as browsers send it: write "
                                                         "scheme://host or scheme://host:port, in lower case, without "
                                                         "a path, a slash at the end, or the scheme's default port")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ClassObjective(Section):
    """What a priority class is promised. A request that would miss it is refused at once."""

    ttft_s: float = Field(gt=0, description="Longest time to first token, in seconds.")
    tpot_s: float = Field(gt=0, description="Longest mean time per further token, in seconds.")


class AdmissionConfig(Section):
    """Load shedding: what is admitted, in which order, and what is refused before it costs anything."""

    mode: Literal["enforce", "shadow", "off"] = Field(
        "enforce", description="`shadow` admits everything within the hard bounds and counts what it would have "
                               "refused; `off` predicts nothing.")
    system: ClassObjective = Field(ClassObjective(ttft_s=10.0, tpot_s=1.0), description="Highest priority.")
    interactive: ClassObjective = Field(ClassObjective(ttft_s=5.0, tpot_s=0.5), description="The default class.")
    batch: ClassObjective = Field(ClassObjective(ttft_s=60.0, tpot_s=2.0), description="Lowest priority.")
    max_waiting: int = Field(512, ge=0, description="Most requests that wait for an attention replica, fleet-wide.")


class MonitoringConfig(Section):
    """What operators see (docs/observability.md)."""

    port: int = Field(9400, ge=0, le=65472, description="First port for scrape targets: each process takes the first "
                                                        "free one of 64 from here on; 0: any free port.")
    host: str | None = Field(None, description="Address that scrape targets listen on; loopback on a local cluster, "
                                               "the node's own address on a joined one, if not set.")
    expert_load: Literal["top", "full"] = Field(
        "top", description="Per-expert metrics: the fullest 8 experts of each layer, or the full matrix of layers and "
                           "experts (a DeepSeek-V3: 29,696 series more per attention replica).")


class InternalTlsConfig(Section):
    """Mutual TLS between gateway, attention replicas and expert workers. Changed files serve new connections."""

    cert_file: Path = Field(description="This cluster's certificate, PEM; every process shows it, as server and "
                                        "as client.")
    key_file: Path = Field(description="Its private key, PEM.")
    ca_file: Path = Field(description="Authorities that peers' certificates must come from, PEM.")
    server_name: str = Field("deepsplit", description="DNS name in the certificate, which every peer must show.")


class LoggingConfig(Section):
    """What every process writes to its log file, see docs/observability.md."""

    format: Literal["text", "json"] = Field("text", description="Text for people, or one JSON object per line.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe lines that are written. `debug` is for deepsplit's own lines; libraries stay "
                            "at info, because their debug lines may hold prompts.")
    prompts: bool = Field(False, description="Also write each request's body, prompt included, as a debug line of the "
                                             "gateway. API keys are never written.")

    @model_validator(mode="after")
    def _says_all_that_is_asked_for(self) -> Self:
        if self.prompts and self.level != "debug":
            raise conflict("prompts", f"request bodies are debug lines, and logging.level is {self.level}: set "
                                       "logging.level: debug, or leave prompts out")
        return self

    @property
    def of_serve(self) -> dict[str, str | bool]:
        """For `logging_config` of Ray Serve: its own lines, before and beside those of our processes."""
        level = "INFO" if self.level == "debug" else self.level.upper()
        # An access line per heartbeat and health check helps nobody; the gateway has its own.
        return {"encoding": self.format.upper(), "log_level": level, "enable_access_log": False}


class RayConfig(Section):
    """The Ray cluster that everything runs on."""

    address: str | None = Field(None, description="Existing cluster to join, such as `auto` or host:port; "
                                                  "a local one is started (and stopped) if not set.")
    num_cpus: int | None = Field(None, ge=1, description="Logical CPUs of a local cluster; what the processes ask for "
                                                         "if not set.")
    start_timeout_s: float = Field(600.0, gt=0, description="Longest wait until everything is ready.")
    stop_timeout_s: float = Field(20.0, gt=0, description="Longest wait for a clean stop, once requests have drained, "
                                                          "before processes are killed.")


class Config(Section):
    """A whole deployment."""

    model: ModelConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = Field(default_factory=DispatchConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)
    internal_tls: InternalTlsConfig | None = Field(
        None, description="Mutual TLS inside the cluster; plain TCP if not set.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    def own_host(self, node: str) -> str:
        """Address for ports that only the cluster needs, on the host with address `node`: a cluster of our own is this
        machine alone.
        """
        return "127.0.0.1" if self.ray.address is None else node

    @model_validator(mode="after")
    def _has_room_to_scale(self) -> Self:
        if self.attention.autoscaling is not None and self.ray.address is None:
            raise conflict(("attention", "autoscaling"), "a cluster of our own has room for attention.replicas only: "
                                                         "set ray.address, or a fixed attention.replicas")
        if self.ray.address is None and (self.experts.spares or any(pool.spares for pool in self.experts.pools)):
            raise conflict(("experts", "spares"), "a cluster of our own has room for experts.workers only: set "
                                                  "ray.address, or leave spares out")
        return self

    @property
    def stop_within_s(self) -> float:
        """Longest clean stop, draining included."""
        return self.gateway.drain_timeout_s + self.ray.stop_timeout_s
