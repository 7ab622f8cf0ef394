"""An attention replica: a Ray Serve deployment around vLLM's own engine client and OpenAI application.

It answers gateways on an HTTP port of its own with vLLM's OpenAI application: every field, check and error is vLLM's.
Import this module in replicas only; it imports vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.config import Config
from cluster.errors import StartupError
from cluster.plan.compute_processes import attention_process, plan_whole_host
from cluster.plan.host_cores import this_host
from deployments.attention.engine import AttentionEngine, openai_app, start_engine
from deployments.attention.engine_args import engine_args, engine_env
from deployments.attention.placement_follower import PlacementFollower
from deployments.attention.plugin import LOAD_FORMAT, check_installed
from deployments.attention.private_port import ReplicaServer
from deployments.attention.settings import RemoteExpertsSettings
from deployments.attention.vllm_internals import CompilationConfig, Counter, Gauge, get_metrics_snapshot
from deployments.directory.calls import DirectoryAway, answer_of, over_grpc
from deployments.directory.members import AttentionMember, Demand, EngineStats
from deployments.hosting.autoscaling import DEMAND, OCCUPANCY, WISH, WISH_VERSION
from deployments.hosting.process_cores import ProcessCores, child_pids, cores_folder
from deployments.hosting.scrape import read_scrape_file, scrape_process
from deployments.hosting.serve_logs import EngineLogging, start_logging
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import EngineMetrics
from routing.requests.request import ReplicaLoad
from routing.tokens.placement import PlacementFile
from routing.tokens.plane_state import ExpertPlaneFile, ExpertPlaneState
from routing.tokens.routed_tokens import RoutedTokens, RoutedTokensFile

_CALL_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class AttentionReplica:
    """One vLLM engine. Raises StartupError when the engine cannot start."""

    async def __init__(self, config_json: str, directory: DeploymentHandle) -> None:  # type: ignore[misc]
        """Start the engine; returns when it is ready for requests. Serve awaits this."""
        # What the engine leaves behind in its temporary folder (sockets, rendezvous files) goes away with ours.
        cluster_folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent
        self._scratch = tempfile.TemporaryDirectory(prefix="attention-", dir=cluster_folder)
        config = Config.model_validate_json(config_json)
        log_file = start_logging(config.logging, "attention")
        tempfile.tempdir = self._scratch.name
        engine_logging = EngineLogging(config.logging, log_file, Path(self._scratch.name) / "logging.json")
        process = attention_process(config)
        host = this_host()
        planned = plan_whole_host(config, host).shares if config.ray.address is None else None
        if process is not None:
            # The engine's processes compute; this one runs where there is room.
            self._cores = ProcessCores(process, host, cores_folder(), planned, child_pids)
            self._cores.start()
        share = self._cores.share if process is not None else None
        # Inherited by the engine's processes.
        os.environ.update(engine_env(config, share) | engine_logging.environment | {"TMPDIR": self._scratch.name})
        self._drain_timeout_s = config.gateway.drain_timeout_s
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._max_num_seqs = config.attention.max_num_seqs
        self._measured: EngineStats | None = None  # at the last scrape
        directory = self._directory = over_grpc(directory)
        self._demand = Demand(None, None)  # as last heard
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
            placement_file=Path(self._scratch.name) / "placement",
            model_path=config.model.path,
            dispatch=config.dispatch,
            internal_tls=config.internal_tls,
            monitoring=config.monitoring.model_copy(update={"host": config.monitoring.host or config.own_host(node)}),
            node=node,
            replica_id=self._replica_id,
            start_timeout_s=config.ray.start_timeout_s,
        )
        ranks = range(config.attention.tensor_parallel_size)
        self._plane_files = [ExpertPlaneFile(settings.plane_file(rank)) for rank in ranks]
        self._token_files = [RoutedTokensFile(settings.routed_tokens_file(rank)) for rank in ranks]
        self._rank_scrape_files = [settings.scrape_file(rank) for rank in ranks]
        self._follower = PlacementFollower(
            directory, PlacementFile(settings.placement_file), self._member_now, self._tokens_now
        )
        args = engine_args(config, settings.as_additional_config(), LOAD_FORMAT, CompilationConfig._attention_ops)
        self._engine, app = await self._start_engine(config, args, engine_logging)
        self._server = ReplicaServer(app, self._load, config.internal_tls)
        url = await self._server.start(config.own_host(node))
        self._member = replace(self._member, state="ready", url=url, token=self._server.token)
        with contextlib.suppress(DirectoryAway):  # the follower's next poll would do, but comes later
            await answer_of(directory.register_replica.remote(self._member), _CALL_TIMEOUT_S)

    async def _start_engine(
        self, config: Config, args: dict[str, Any], engine_logging: EngineLogging
    ) -> tuple[AttentionEngine, ASGIApp]:
        try:
            async with asyncio.timeout(config.ray.start_timeout_s):
                engine, app_args = start_engine(config, args, engine_logging.write_for_children)
                return engine, await openai_app(engine, app_args)
        except TimeoutError as error:
            raise StartupError(
                f"the attention engine was not ready after {config.ray.start_timeout_s:.0f} s: raise "
                "ray.start_timeout_s, or look at the engine_*.log beside this replica's for what it waited for"
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
        engine = self._engine.vllm_config
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

    async def check_health(self) -> None:
        """Serve's health check. Raises if the engine is dead."""
        await self._engine.check_health()

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
            self._demand = await answer_of(self._directory.demand.remote(self._demand.wish), _CALL_TIMEOUT_S)
        except DirectoryAway as error:
            logger.warning("the directory is away (%s); the last known demand stays", type(error).__name__)
        said = {OCCUPANCY: (stats.running + stats.waiting) / self._max_num_seqs}
        if self._demand.replicas is not None:
            said[DEMAND] = self._demand.replicas
        if (wish := self._demand.wish) is not None:
            said |= {WISH: float(wish.attention), WISH_VERSION: float(wish.version)}
        return said

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
        """Return the worst that any rank reports: each sends its share of the rows, and a step waits for all."""
        states = [file.read(time.time()) for file in self._plane_files]
        return ExpertPlaneState(max(state.queue_s for state in states), any(state.degraded for state in states))

    def _member_now(self) -> AttentionMember:
        """Return what this replica registers with: with the scrape targets of the engine's ranks, once they listen."""
        if len(self._member.scrape) <= len(self._rank_scrape_files):
            found = [read_scrape_file(file) for file in self._rank_scrape_files]
            ranks = (target for target in found if target is not None)
            self._member = replace(self._member, scrape=(self._scrape.target, *ranks))
        if hasattr(self, "_cores"):
            self._member = replace(self._member, cores=str(self._cores.share))
        return self._member

    def _tokens_now(self) -> RoutedTokens | None:
        """Return the tokens of all ranks: each sends its share of the rows."""
        read = [file.read() for file in self._token_files]
        return RoutedTokens.added(tokens for tokens in read if tokens is not None)

    async def __del__(self) -> None:
        server = getattr(self, "_server", None)  # absent if the constructor failed early, as are those below
        if server is not None:
            self._member = replace(self._member, state="draining")
            await server.stop(self._drain_timeout_s)
        if (follower := getattr(self, "_follower", None)) is not None:
            follower.stop()
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.shutdown()
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
