"""The gateway as a Serve replica: it listens itself, and Serve only places, watches, drains and restarts it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.config import Config
from cluster.errors import ReplicaUnavailable
from deployments.directory.calls import DirectoryAway, answer_of, over_grpc
from deployments.directory.members import ClusterView, EngineStats, GatewayMember
from deployments.gateway.server import GatewayServer
from deployments.hosting.background import BackgroundTasks
from deployments.hosting.scrape import scrape_process
from deployments.hosting.serve_logs import start_logging
from monitoring.exporter import ProcessRegistry

NAME = "gateway"
# Serve's own head node: clients of a cluster whose gateways were not placed otherwise find them there.
_HEAD_NODE = "node:__internal_head__"
_RETRY_S = 0.5
_DRAIN_POLL_S = 0.1
_STATUS_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 12.0  # of a long poll

logger = logging.getLogger(__name__)


class Gateway:
    """Serve replica. Serve routes no requests to it: clients reach its own ports."""

    # Serve awaits an async constructor.
    async def __init__(  # type: ignore[misc]
        self, config_json: str, directory: DeploymentHandle, attention: DeploymentHandle, *_others: DeploymentHandle
    ) -> None:
        """`_others` are never called: Serve deploys what the ingress is bound to."""
        config = Config.model_validate_json(config_json)
        start_logging(config.logging, "gateway")
        self._directory = over_grpc(directory)
        self._attention = attention
        self._drain_timeout_s = config.gateway.drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        registry = ProcessRegistry()
        self._server = GatewayServer(config, self._cluster_status, registry)
        await self._server.start()
        node = ray.util.get_node_ip_address()
        self._id = f"gateway-{uuid.uuid4().hex[:8]}"
        self._scrape = scrape_process(registry, "gateway", self._id, node, config)
        self._background = BackgroundTasks(logger)
        self._background.start("following the directory", self._follow())

    async def ready(self) -> bool:
        """Whether a request would find an attention replica."""
        return all(self._server.pipeline.ready().values())

    async def check_health(self) -> None:
        """Serve replaces a gateway whose check raises."""
        self._background.check()
        self._server.check()

    async def _follow(self) -> None:
        """Keeps up with the directory, by long poll; one that is away leaves everything as it is."""
        version = -1
        while True:
            server, draining, scrape = self._server, self._draining is not None, self._scrape.target
            open_requests, in_flight = len(server.pipeline.open_requests), server.in_flight()
            member = GatewayMember(
                self._id, os.getpid(), scrape.node, open_requests, in_flight, draining, scrape, server.demand()
            )
            try:
                asked = self._directory.register_gateway.remote(member, version)
                view: ClusterView | None = await answer_of(asked, _ANSWER_TIMEOUT_S)
                if view is not None:
                    version = view.version
                    self._take(view)
                if self._draining is not None:
                    await asyncio.sleep(_DRAIN_POLL_S)
            except DirectoryAway as error:
                logger.warning("the directory is away (%s); serving goes on", error)
                await asyncio.sleep(_RETRY_S)

    def _take(self, view: ClusterView) -> None:
        self._server.set_endpoints(view.endpoints)
        self._server.set_targets(view.targets)
        if view.admission is not None:
            self._server.set_admission(view.admission)
        if view.draining and self._draining is None:
            self._draining = asyncio.create_task(self._server.drain(self._drain_timeout_s))
            self._draining.add_done_callback(_log_failure)

    async def _cluster_status(self) -> Mapping[str, object]:
        """What the directory knows of both planes, and the counters of one attention replica's engine."""
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                cluster = json.loads(await answer_of(self._directory.status.remote(), _ANSWER_TIMEOUT_S))
                stats: EngineStats = await self._attention.engine_stats.remote()
        except (DirectoryAway, RayError, RayServeException, TimeoutError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ReplicaUnavailable(f"the cluster is not ready: {reason}") from error
        return {**cluster, "engine": dataclasses.asdict(stats) | {"spec_acceptance": stats.spec_acceptance}}

    async def __del__(self) -> None:
        background = getattr(self, "_background", None)  # absent if the constructor failed early
        if background is not None:
            await background.cancel()
        server = getattr(self, "_server", None)
        if server is not None:
            await server.stop(self._drain_timeout_s)
        scrape = getattr(self, "_scrape", None)
        if scrape is not None:
            scrape.stop()


def _log_failure(draining: asyncio.Task[None]) -> None:
    if not draining.cancelled() and (error := draining.exception()) is not None:
        logger.error("draining failed", exc_info=error)


def gateway_deployment(
    config: Config, directory: serve.Application, attention: serve.Application, *others: serve.Application
) -> serve.Application:
    """The application's ingress, bound to the deployments behind it."""
    placement = config.gateway.placement
    resources = dict(placement.resources)
    options: dict[str, Any] = {"num_cpus": placement.num_cpus or 0}
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    elif not resources:
        resources[_HEAD_NODE] = 0.001
    deployment = serve.deployment(
        Gateway,
        name=NAME,
        num_replicas=config.gateway.replicas,
        ray_actor_options=options | {"resources": resources},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=config.logging.of_serve,
    )
    return deployment.bind(config.model_dump_json(), directory, attention, *others)
