"""Everything of a gateway replica but Ray: servers, door, admission, connections to the attention replicas.

One event loop holds it all. `deployments.gateway.replica` wraps it in a Serve replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version

from cluster.config import Config
from cluster.errors import NoCapacity, Plane, Reason, ReplicaUnavailable
from cluster.tls.contexts import server_ssl_context
from deployments.admission.client import AdmissionClient
from deployments.admission.local import LocalAdmission
from deployments.admission.replica_loads import ReplicaLoads
from deployments.admission.waiting_room import TICK_S, WaitingRoom
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint, ResponseHead
from deployments.gateway.detokenizer import ModelTokens
from deployments.gateway.grpc.server import GrpcServer
from deployments.gateway.meter import RequestMeters
from deployments.gateway.openapi import gateway_document
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.pipeline import GatewayDoor
from deployments.gateway.rest.api import GET_PATHS, POST_PATHS, RestApi
from deployments.gateway.upstream.pool import ReplicaPool
from deployments.hosting.http_server import HttpServer
from monitoring.discovery import ScrapeTarget, discovery_document
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import GatewayMetrics
from routing.requests.quota import Quotas
from routing.requests.tenants import TenantsFile

_OWN_PATHS = {
    "/health": "This process is alive.",
    "/ready": "Whether a request would find a replica, per model; 503 if not.",
    "/openapi.json": "This document.",
    "/metrics": "Prometheus metrics of this gateway replica; for operators.",
    "/sd/prometheus": "Prometheus HTTP service discovery of every process of the cluster; for operators.",
    "/v1/deepsplit/status": "State of both planes, of the engine and of admission.",
}

ClusterStatus = Callable[[], Awaitable[Mapping[str, object]]]


class GatewayServer:
    """One gateway. Raises ConfigError or StartupError."""

    def __init__(self, config: Config, cluster_status: ClusterStatus, registry: ProcessRegistry) -> None:
        """Must be made inside the event loop that it will run on."""
        gateway = config.gateway
        self.model = config.model.name or config.model.path.name
        self._config = config
        self._cluster_status = cluster_status
        self._tenants = TenantsFile(gateway.keys_file)
        self.gate = WaitingRoom(time.monotonic)
        self._quotas = Quotas()
        self._local = self._decide_alone()
        self._fleet: AdmissionClient | None = None
        if gateway.replicas > 1:
            self._fleet = AdmissionClient(
                self.gate, self._decide_alone, self._quotas, time.monotonic, config.internal_tls
            )
        else:
            self.gate.decide_by(self._local)
        self._replicas = ReplicaLoads(
            config.internal_tls,
            gateway.replica_timeout_s,
            on_change=self._on_loads,
            on_lost=lambda replica_id: self._pool.abort(replica_id),
        )
        self._pool = ReplicaPool(config.internal_tls, self._replicas)
        tokens = ModelTokens(config.model.path)
        self._metrics = GatewayMetrics(registry)
        meters = RequestMeters(self._metrics, config.admission, time.monotonic)
        self.door = GatewayDoor(
            self.model, gateway, self._tenants, self.gate, self._pool, tokens, meters, config.logging.prompts
        )
        self._targets: Sequence[ScrapeTarget] = ()
        pages = OperatorPages(registry, lambda: discovery_document(self._targets, self.model), self._status)
        rest = RestApi(self.door, gateway.max_body_mib * 2**20, pages, self._openapi)
        self._http = HttpServer(rest.app, server_ssl_context(gateway.tls) if gateway.tls else None)
        self._grpc = None if gateway.grpc_port is None else GrpcServer(gateway, self.model, self.door)
        self._document: bytes | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen on both ports, which replicas on one node share."""
        gateway = self._config.gateway
        await self._http.start(gateway.host, gateway.port, "gateway.port", share_port=True)
        if self._grpc is not None:
            await self._grpc.start()
        self._ticking = asyncio.create_task(self._tick())

    def in_flight(self) -> dict[str, int]:
        """Requests that attention replicas have, by replica id."""
        return self._pool.in_flight()

    def demand(self) -> float:
        """Attention replicas that this gateway's requests would fill; 0 while the common admission decides."""
        decides = self._fleet is None or not self._fleet.connected
        return self._local.demand().in_replicas if decides else 0.0

    def set_endpoints(self, endpoints: Sequence[ReplicaEndpoint]) -> None:
        """The attention replicas that there are."""
        self._replicas.set_endpoints(endpoints)

    def set_targets(self, targets: Sequence[ScrapeTarget]) -> None:
        """Every process of the cluster that has metrics."""
        self._targets = targets

    def set_admission(self, endpoint: AdmissionEndpoint) -> None:
        """Where the common admission of several gateways listens."""
        if self._fleet is not None:
            self._fleet.set_server(endpoint.address, endpoint.token)

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end within the grace, end the rest with an error, close everything."""
        await self.door.drain(grace_s)
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        await self._http.stop(1.0)
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
        if self._fleet is not None:
            await self._fleet.close()
        await self._replicas.close()
        await self._pool.close()

    def _decide_alone(self) -> LocalAdmission:
        share = 1 / self._config.gateway.replicas
        self._local = LocalAdmission(
            self._config.admission, time.monotonic, self.gate.decided, share, self._quotas
        )
        return self._local

    def _on_loads(self) -> None:
        loads = self._replicas.current()
        self._metrics.replicas.set(len(loads))
        self.gate.set_loads(loads)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
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
            "open_requests": self.door.open_requests, "tickets": self.gate.open_tickets(), "replicas": replicas,
            # None: there is one gateway, which needs none. False: this gateway decides alone for now.
            "common_admission": None if self._fleet is None else self._fleet.connected,
        }  # fmt: skip
        return {"model": self.model, **cluster, "gateway": gateway}

    async def _openapi(self) -> bytes:
        if self._document is None:
            engine = await self._get("/openapi.json")
            self._document = gateway_document(engine, version("deepsplit"), (*POST_PATHS, *GET_PATHS), _OWN_PATHS)
        return self._document

    async def _get(self, path: str) -> bytes:
        for load in self._replicas.current():
            with contextlib.suppress(ReplicaUnavailable):
                items = [item async for item in self._pool.send(load.replica_id, "GET", path, b"", "openapi")]
                if isinstance(items[0], ResponseHead) and items[0].status == 200:
                    return b"".join(item for item in items if isinstance(item, bytes))
        raise NoCapacity(
            "no attention replica is ready", retry_after_s=5.0, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA
        )
