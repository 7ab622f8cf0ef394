"""An attention replica: an unmodified vLLM engine inside a Ray Serve replica.

It answers gateways on an HTTP port of its own with vLLM's OpenAI application: every field, check and error is vLLM's.
Import this module in replicas only; it imports vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from prometheus_client import REGISTRY
from ray import serve
from ray.exceptions import RayError
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig, LLMServer, ModelLoadingConfig
from ray.util.placement_group import PlacementGroup
from vllm.config import CompilationConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.platforms import current_platform
from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

from cluster.config import Config
from cluster.errors import StartupError
from cluster.plan.compute_processes import attention_process, plan_whole_host
from cluster.plan.host_cores import this_host
from deployments.attention.engine_args import engine_args, engine_env
from deployments.attention.placement_follower import PlacementFollower
from deployments.attention.plugin import LOAD_FORMAT, check_installed
from deployments.attention.private_port import ReplicaServer
from deployments.attention.request_faults import told_as_client_errors
from deployments.attention.settings import RemoteExpertsSettings
from deployments.directory.members import AttentionMember, EngineStats
from deployments.hosting.autoscaling import DEMAND, OCCUPANCY
from deployments.hosting.process_cores import ProcessCores, child_pids, cores_folder
from deployments.hosting.scrape import read_scrape_file, scrape_process
from deployments.hosting.serve_logs import start_logging, write_engine_logging
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import EngineMetrics
from routing.requests.request import ReplicaLoad
from routing.tokens.placement import PlacementFile
from routing.tokens.plane_state import ExpertPlaneFile, ExpertPlaneState

logger = logging.getLogger(__name__)


class LocalCheckpoint(CallbackBase):
    """Tells Ray Serve LLM that the checkpoint is a folder, so that no node runs a download task (25 s of imports)."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


def llm_config(config: Config, args: dict[str, Any]) -> LLMConfig:
    """Return Ray Serve LLM's description of the engine that `args` (see `engine_args`) start."""
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=config.model.served_name, model_source=str(config.model.path)),
        accelerator_config={"kind": "cpu" if config.attention.device == "cpu" else "gpu"},
        engine_kwargs=args,
        # vLLM's metrics stay in this process's own Prometheus registry, where `engine_stats` reads them.
        log_engine_metrics=False,
        callback_config=CallbackConfig(callback_class=LocalCheckpoint),
    )


class LocalEngine(VLLMEngine):
    """Ray Serve LLM's engine, with one process less on CPU: the only rank runs inside the engine core.

    vLLM gives a CPU rank its own process only to set OpenMP's environment before torch loads; the replica has set it
    by then. Saves a second import of vLLM (10 s and 0.5 GB) and a hop in shared memory per step.
    """

    aliases: tuple[str, ...] = ()  # further names of the model in requests

    def _start_async_llm_engine(
        self, vllm_engine_args: AsyncEngineArgs, vllm_engine_config: VllmConfig, placement_group: PlacementGroup
    ) -> EngineClient:
        parallel = vllm_engine_config.parallel_config
        if current_platform.is_cpu() and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        vllm_engine_args.served_model_name = [*vllm_engine_args.served_model_name, *self.aliases]
        engine = super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)
        engine.generate = told_as_client_errors(engine.generate)
        return engine


class AttentionReplica(LLMServer):
    """One vLLM engine. Raises StartupError when the engine cannot start."""

    async def __init__(self, config_json: str, directory: DeploymentHandle) -> None:  # type: ignore[misc]
        """Start the engine; returns when it is ready for requests. Serve awaits this."""
        # What the engine leaves behind in its temporary folder (sockets, rendezvous files) goes away with ours.
        cluster_folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent
        self._scratch = tempfile.TemporaryDirectory(prefix="attention-", dir=cluster_folder)
        config = Config.model_validate_json(config_json)
        log_file = start_logging(config.logging, "attention")
        tempfile.tempdir = self._scratch.name
        logging_env = write_engine_logging(config.logging, log_file, Path(self._scratch.name) / "logging.json")
        process = attention_process(config)
        host = this_host()
        planned = plan_whole_host(config, host).shares if config.ray.address is None else None
        if process is not None:
            # The engine's processes compute; this one runs where there is room.
            self._cores = ProcessCores(process, host, cores_folder(), planned, child_pids)
            self._cores.start()
        share = self._cores.share if process is not None else None
        # Inherited by the engine's processes.
        os.environ.update(engine_env(config, share) | logging_env | {"TMPDIR": self._scratch.name})
        self._drain_timeout_s = config.gateway.drain_timeout_s
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._max_num_seqs = config.attention.max_num_seqs
        self._measured: EngineStats | None = None  # at the last scrape
        self._directory = directory
        self._demand: float | None = None  # of all clients, in attention replicas, as last heard
        node = ray.util.get_node_ip_address()
        registry = ProcessRegistry(REGISTRY)  # vLLM's
        self._metrics = EngineMetrics(registry)
        self._metrics.decode_slots.set(self._max_num_seqs)
        self._scrape = scrape_process(registry, "attention", self._replica_id, node, config)
        registry.before_scrape(self._measure)
        self._member = AttentionMember(
            self._replica_id, os.getpid(), node, "starting", scrape=(self._scrape.target,),
            cores="" if share is None else str(share),
        )  # fmt: skip
        check_installed()
        settings = RemoteExpertsSettings(
            placement_file=Path(self._scratch.name) / "placement.json",
            model_path=config.model.path,
            dispatch=config.dispatch,
            internal_tls=config.internal_tls,
            monitoring=config.monitoring.model_copy(update={"host": config.monitoring.host or config.own_host(node)}),
            node=node,
            replica_id=self._replica_id,
            start_timeout_s=config.ray.start_timeout_s,
        )
        self._plane_file = ExpertPlaneFile(settings.plane_file)
        self._engine_scrape_file = settings.scrape_file
        self._follower = PlacementFollower(directory, PlacementFile(settings.placement_file), self._member_now)
        args = engine_args(config, settings.as_additional_config(), LOAD_FORMAT, CompilationConfig._attention_ops)
        self._start_timeout_s = config.ray.start_timeout_s
        self._aliases = config.model.aliases
        await super().__init__(llm_config(config, args), engine_cls=LocalEngine)
        self._server = ReplicaServer(await self.__serve_build_asgi_app__(), self._load, config.internal_tls)
        url = await self._server.start(config.own_host(node))
        self._member = replace(self._member, state="ready", url=url, token=self._server.token)
        await directory.register_replica.remote(self._member)  # the follower's next poll would do, but comes later

    async def start(self) -> None:
        """Start the engine. Unlike the base class, sends no telemetry, which would start one more Ray actor."""
        self.engine = self._engine_cls(self._llm_config)
        self.engine.aliases = self._aliases
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self.engine.start()
        except TimeoutError as error:
            raise StartupError(
                f"the attention engine was not ready after {self._start_timeout_s:.0f} s: raise ray.start_timeout_s, "
                "or look at the engine_*.log beside this replica's for what it waited for"
            ) from error
        except Exception as error:
            raise StartupError(
                f"the attention engine could not start: {error} (its own messages are in the engine_*.log beside this "
                "replica's)"
            ) from error

    async def _load(self) -> ReplicaLoad:
        """Return this replica's load, for the gateways. Raises if the engine is dead."""
        stats = await self.engine_stats()
        plane = self._expert_plane_state()
        engine = self.engine._engine_client.vllm_config
        cache = engine.cache_config
        return ReplicaLoad(
            self._replica_id,
            max_num_seqs=self._max_num_seqs,
            kv_cache_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
            max_model_len=engine.model_config.max_model_len,
            running=stats.running,
            waiting=stats.waiting,
            kv_cache_usage=stats.kv_cache_usage,
            experts_queue_s=plane.queue_s,
            degraded=plane.degraded,
        )

    async def engine_stats(self) -> EngineStats:
        """Return what the engine last reported. Raises if the engine is dead."""
        await self.check_health()
        stats = _engine_stats()
        assert stats is not None, "the engine is there as soon as this class is"
        return stats

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve what it needs when it sets the number of replicas."""
        stats = await self.engine_stats()
        try:
            self._demand = await self._directory.demand.remote()
        except (RayError, RayServeException) as error:
            logger.warning("the directory is away (%s); the last known demand stays", type(error).__name__)
        said = {OCCUPANCY: (stats.running + stats.waiting) / self._max_num_seqs}
        return said if self._demand is None else said | {DEMAND: self._demand}

    def _measure(self) -> None:
        """Bring the metrics up to date, on the scraping thread. Does nothing before the engine is there."""
        stats = _engine_stats()
        if stats is None:
            return
        metrics, before = self._metrics, self._measured
        metrics.running.set(stats.running)
        metrics.waiting.set(stats.waiting)
        metrics.kv_cache_usage.set(stats.kv_cache_usage)
        metrics.experts_queue.set(self._expert_plane_state().queue_s)
        metrics.mtp_drafted.inc(stats.spec_draft_tokens - (before.spec_draft_tokens if before else 0))
        metrics.mtp_accepted.inc(stats.spec_accepted_tokens - (before.spec_accepted_tokens if before else 0))
        self._measured = stats

    def _expert_plane_state(self) -> ExpertPlaneState:
        return self._plane_file.read(time.time())

    def _member_now(self) -> AttentionMember:
        """Return what this replica registers with: with the engine's scrape target, once that listens."""
        if len(self._member.scrape) == 1 and (engine := read_scrape_file(self._engine_scrape_file)) is not None:
            self._member = replace(self._member, scrape=(*self._member.scrape, engine))
        if hasattr(self, "_cores"):
            self._member = replace(self._member, cores=str(self._cores.share))
        return self._member

    async def __del__(self) -> None:
        server = getattr(self, "_server", None)  # absent if the constructor failed early, as are those below
        if server is not None:
            self._member = replace(self._member, state="draining")
            await server.stop(self._drain_timeout_s)
        if (follower := getattr(self, "_follower", None)) is not None:
            follower.stop()
        engine = getattr(self, "engine", None)
        if engine is not None and engine._engine_client is not None:
            engine._engine_client.shutdown()
        await super().__del__()
        if (cores := getattr(self, "_cores", None)) is not None:
            cores.close()
        self._scratch.cleanup()
        if (scrape := getattr(self, "_scrape", None)) is not None:
            scrape.stop()


def _engine_stats() -> EngineStats | None:
    """Read the engine's state from vLLM's metrics in this process; None before the engine is there."""
    totals: dict[str, float] = {}
    for metric in get_metrics_snapshot():
        if isinstance(metric, Counter | Gauge):
            totals[metric.name] = totals.get(metric.name, 0) + metric.value
    if "vllm:num_requests_running" not in totals:
        return None
    return EngineStats(
        running=int(totals["vllm:num_requests_running"]),
        waiting=int(totals["vllm:num_requests_waiting"]),
        kv_cache_usage=totals["vllm:kv_cache_usage_perc"],
        spec_draft_tokens=int(totals.get("vllm:spec_decode_num_draft_tokens", 0)),
        spec_accepted_tokens=int(totals.get("vllm:spec_decode_num_accepted_tokens", 0)),
        generation_tokens=int(totals["vllm:generation_tokens"]),
        prompt_tokens=int(totals["vllm:prompt_tokens"]),
    )
