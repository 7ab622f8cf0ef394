"""Everything of a gateway replica but Ray: servers, pipeline, admission, connections to the attention replicas.

One event loop holds it all. `deployments.gateway.replica` wraps it in a Serve replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from cluster.config import Config
from cluster.errors import NoCapacity, Plane, Reason, ReplicaUnavailable
from cluster.tls.contexts import server_ssl_context
from deployments.admission.client import AdmissionClient
from deployments.admission.local import LocalAdmission
from deployments.admission.replica_loads import ReplicaLoads
from deployments.admission.waiting_room import TICK_S, WaitingRoom
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint, ResponseHead
from deployments.gateway.detokenizer import ModelTokenizer
from deployments.gateway.grpc.server import GrpcServer
from deployments.gateway.meter import RequestMeter
from deployments.gateway.models import ModelPages
from deployments.gateway.openapi import ServerDescription
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.paths import POST_PATHS
from deployments.gateway.pipeline import Pipeline
from deployments.gateway.rest.api import RestApi
from deployments.gateway.upstream.pool import ReplicaPool
from deployments.hosting.background import BackgroundTasks
from deployments.hosting.http_connection import ConnectionBounds
from deployments.hosting.http_server import HttpServer
from monitoring.discovery import ScrapeTarget, discovery_document
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import GatewayMetrics
from routing.requests.quota import Quotas
from routing.requests.tenants import TenantsFile

logger = logging.getLogger(__name__)

_DESCRIPTION_TIMEOUT_S = 5.0

ClusterStatus = Callable[[], Awaitable[Mapping[str, object]]]


class GatewayServer:
    """One gateway. Raises ConfigError or StartupError."""

    def __init__(self, config: Config, cluster_status: ClusterStatus, registry: ProcessRegistry) -> None:
        """Must be made inside the event loop that it will run on."""
        gateway = config.gateway
        self._config = config
        self._cluster_status = cluster_status
        self._registry = registry
        self._models = (config.model.served_name, *config.model.aliases)
        self._metrics = GatewayMetrics(registry)
        self._background = BackgroundTasks(logger)
        self._targets: Sequence[ScrapeTarget] = ()
        self.room = WaitingRoom(time.monotonic)
        self._quotas = Quotas()
        self._local = self._decide_alone()
        self._common: AdmissionClient | None = None
        if gateway.replicas > 1:
            self._common = AdmissionClient(
                self.room, self._decide_alone, self._quotas, time.monotonic, config.internal_tls
            )
        else:
            self.room.decide_by(self._local)
        self._replicas = ReplicaLoads(
            config.internal_tls,
            gateway.replica_timeout_s,
            on_change=self._on_loads,
            on_lost=lambda replica_id: self._pool.abort(replica_id),
        )
        self._pool = ReplicaPool(config.internal_tls, self._replicas)
        self.pipeline = self._pipeline()
        models = ModelPages(self._models, _created(config.model.path), self._pool.loads)
        pages = OperatorPages(registry, lambda: discovery_document(self._targets, self._models[0]), self._status)
        description = ServerDescription(version("deepsplit"), POST_PATHS, self._get)
        rest = RestApi(self.pipeline, gateway, models, pages, description)
        bounds = ConnectionBounds(gateway.idle_timeout_s, gateway.first_request_timeout_s, gateway.write_stall_s)
        self._http = HttpServer(rest.app, server_ssl_context(gateway.tls) if gateway.tls else None, bounds)
        self._grpc: GrpcServer | None = None
        if gateway.grpc_port is not None:
            self._grpc = GrpcServer(gateway, self.pipeline, models)

    def _pipeline(self) -> Pipeline:
        config = self._config
        return Pipeline(
            self._models,
            config.gateway,
            TenantsFile(config.gateway.keys_file),
            self.room,
            self._pool,
            ModelTokenizer(config.model.path),
            RequestMeter(self._metrics, config.admission, time.monotonic, self._models[0]),
            config.logging.prompts,
        )

    async def start(self) -> None:
        """Listen on both ports, which replicas on one node share."""
        gateway = self._config.gateway
        await self._http.start(gateway.host, gateway.port, "gateway.port", share_port=True)
        if self._grpc is not None:
            await self._grpc.start()
        self._background.start("the tick of admission", self._tick())

    def check(self) -> None:
        """Raises RuntimeError when something that must run has ended."""
        self._background.check()
        if self._common is not None:
            self._common.check()

    def in_flight(self) -> dict[str, int]:
        """Requests that attention replicas have, by replica id."""
        return self._pool.in_flight()

    def demand(self) -> float:
        """Attention replicas that this gateway's requests would fill; 0 while the common admission decides."""
        return self._local.demand().in_replicas if self._decides_alone() else 0.0

    def _decides_alone(self) -> bool:
        """Whether this gateway's own admission decides; one that has been relieved must say nothing more."""
        return self._common is None or not self._common.connected

    def set_endpoints(self, endpoints: Sequence[ReplicaEndpoint]) -> None:
        """The attention replicas that there are."""
        self._replicas.set_endpoints(endpoints)

    def set_targets(self, targets: Sequence[ScrapeTarget]) -> None:
        """Every process of the cluster that has metrics."""
        self._targets = targets

    def set_admission(self, endpoint: AdmissionEndpoint) -> None:
        """Where the common admission of several gateways listens."""
        if self._common is not None:
            self._common.set_server(endpoint.address, endpoint.token)

    async def drain(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end within the grace, end the rest with an error.

        Where there are other gateways, new connections reach those at once: this one no longer accepts any.
        """
        if self._config.gateway.replicas > 1:
            self._http.close_listener()
            if self._grpc is not None:
                await self._grpc.drain()
        await self.pipeline.open_requests.drain(grace_s)

    async def stop(self, grace_s: float) -> None:
        """Drain, and close everything."""
        await self.drain(grace_s)
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        await self._http.stop(1.0)
        await self._background.cancel()
        if self._common is not None:
            await self._common.close()
        await self._replicas.close()
        await self._pool.close()

    def _decide_alone(self) -> LocalAdmission:
        fraction = 1 / self._config.gateway.replicas
        self._local = LocalAdmission(
            self._config.admission, time.monotonic, self.room.decided, self._quotas, fraction
        )
        return self._local

    def _on_loads(self) -> None:
        loads = self._replicas.current()
        self._metrics.replicas.set(len(loads))
        self.room.set_loads(loads)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._decides_alone():
                self._local.tick()

    async def _status(self) -> Mapping[str, object]:
        replicas = [
            {
                "id": load.replica_id, "running": load.running, "waiting": load.waiting,
                "kv_cache_usage": load.kv_cache_usage, "experts_queue_s": load.experts_queue_s,
            }
            for load in self._replicas.current()
        ]  # fmt: skip
        cluster = await self._cluster_status()
        gateway = {
            "open_requests": len(self.pipeline.open_requests), "tickets": self.room.open_tickets(),
            "replicas": replicas,
            # None: there is one gateway, which needs none. False: this gateway decides alone for now.
            "common_admission": None if self._common is None else self._common.connected,
        }  # fmt: skip
        return {"model": self._models[0], **cluster, "gateway": gateway}

    async def _get(self, path: str) -> bytes:
        for load in self._replicas.current():
            with contextlib.suppress(ReplicaUnavailable, TimeoutError):
                async with asyncio.timeout(_DESCRIPTION_TIMEOUT_S):
                    items = [item async for item in self._pool.send(load.replica_id, "GET", path, b"", {})]
                if isinstance(items[0], ResponseHead) and items[0].status == 200:
                    return b"".join(item for item in items if isinstance(item, bytes))
        raise NoCapacity(
            "no attention replica is ready", retry_after_s=5.0, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA
        )


def _created(model: Path) -> int:
    """When the checkpoint was made, as far as its files say: the same at every gateway."""
    try:
        return int((model / "config.json").stat().st_mtime)
    except OSError:
        return 0
