"""The common admission of several gateways as a Serve replica (see `server`). One gateway needs none."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import Config
from deployments.admission.replica_loads import ReplicaLoads
from deployments.admission.server import AdmissionServer
from deployments.directory.calls import DirectoryAway, answer_of, over_grpc
from deployments.directory.members import AdmissionEndpoint, ClusterView
from deployments.hosting.background import BackgroundTasks
from deployments.hosting.scrape import scrape_process
from deployments.hosting.serve_logs import start_logging
from monitoring.exporter import ProcessRegistry

NAME = "admission"
_RETRY_S = 0.5
_ANSWER_TIMEOUT_S = 12.0  # of a long poll

logger = logging.getLogger(__name__)


class AdmissionService:
    """Serve replica. Serve routes nothing to it: gateways keep streams to its own port."""

    # Serve awaits an async constructor.
    async def __init__(self, config_json: str, directory: DeploymentHandle) -> None:  # type: ignore[misc]
        config = Config.model_validate_json(config_json)
        start_logging(config.logging, "admission")
        token = secrets.token_hex(32)
        self._directory = over_grpc(directory)
        self._server = AdmissionServer(config.admission, time.monotonic, token, config.internal_tls)
        self._replicas = ReplicaLoads(config.internal_tls, config.gateway.replica_timeout_s, self._on_loads)
        node = ray.util.get_node_ip_address()
        self._scrape = scrape_process(ProcessRegistry(), "admission", "", node, config)
        address = await self._server.start(config.own_host(node))
        self._endpoint = AdmissionEndpoint(address, token)
        self._background = BackgroundTasks(logger)
        self._background.start("following the directory", self._follow())

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        self._background.check()
        self._server.check()

    def _on_loads(self) -> None:
        self._server.set_loads(self._replicas.current())

    async def _follow(self) -> None:
        version = -1
        while True:
            try:
                asked = self._directory.register_admission.remote(
                    self._endpoint, self._scrape.target, version, self._server.demand().in_replicas
                )
                view: ClusterView | None = await answer_of(asked, _ANSWER_TIMEOUT_S)
                if view is not None:
                    version = view.version
                    self._replicas.set_endpoints(view.endpoints)
            except DirectoryAway as error:
                logger.warning("the directory is away (%s); admission goes on", error)
                await asyncio.sleep(_RETRY_S)

    async def __del__(self) -> None:
        if (background := getattr(self, "_background", None)) is not None:  # absent if the constructor failed early
            await background.cancel()
            await self._server.stop()
            await self._replicas.close()
            self._scrape.stop()


def admission_deployment(config: Config, directory: serve.Application) -> serve.Application:
    """The common admission, bound."""
    deployment = serve.deployment(
        AdmissionService,
        name=NAME,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=config.logging.of_serve,
    )
    return deployment.bind(config.model_dump_json(), directory)
