"""The one door for clients: a Serve ingress that stays light, without vLLM or torch, in front of attention replicas."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, Mapping

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.config import Config
from cluster.errors import ReplicaUnavailable
from deployments.attention import EngineStats, ResponseHead
from deployments.rest import RestApi

NAME = "gateway"


class AttentionPlane:
    """The attention replicas, reached through Serve. Serve picks the replica: the one with fewer requests of two."""

    def __init__(self, attention: DeploymentHandle, directory: DeploymentHandle | None) -> None:
        self._attention = attention
        self._directory = directory

    async def http(
        self, method: str, path: str, body: bytes, request_id: str
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """See `rest.Plane.http`."""
        answer = self._attention.options(stream=True).http.remote(method, path, body, request_id)
        ended = False
        try:
            async for item in answer:
                yield item
            ended = True
        except (RayError, RayServeException) as error:
            raise ReplicaUnavailable(f"the attention replica failed, please retry: {_first_line(error)}") from error
        finally:
            if not ended:
                answer.cancel()

    async def status(self) -> Mapping[str, object]:
        """Counters of one attention replica's engine, and what the directory knows of both planes."""
        try:
            stats: EngineStats = await self._attention.engine_stats.remote()
            cluster = {} if self._directory is None else json.loads(await self._directory.status.remote())
        except (RayError, RayServeException) as error:
            raise ReplicaUnavailable(f"the cluster is not ready: {_first_line(error)}") from error
        engine = dataclasses.asdict(stats) | {"spec_acceptance": stats.spec_acceptance}
        return {**cluster, "engine": engine}


@serve.ingress()
class Gateway:
    """The Serve replica that holds the REST application. Serve's proxy listens; this answers."""

    def __init__(
        self,
        config_json: str,
        attention: DeploymentHandle,
        directory: DeploymentHandle | None,
        experts: DeploymentHandle | None,
    ) -> None:
        """`experts` is never called: Serve deploys what the ingress is bound to."""
        config = Config.model_validate_json(config_json)
        name = config.model.name or config.model.path.name
        self._rest = RestApi(name, config.gateway, AttentionPlane(attention, directory))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor."""
        return self._rest.app


def gateway_deployment(
    config: Config,
    attention: serve.Application,
    directory: serve.Application | None,
    experts: serve.Application | None,
) -> serve.Application:
    """The application's ingress, bound to the deployments behind it. Without directory and experts: unsplit."""
    deployment = serve.deployment(
        Gateway,
        name=NAME,
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=config.gateway.max_streams,
        graceful_shutdown_timeout_s=config.ray.stop_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(config.model_dump_json(), attention, directory, experts)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
