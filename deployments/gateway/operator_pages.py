"""What the gateway shows operators only: metrics, service discovery, status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import PermissionDenied
from deployments.gateway.head import api_key
from deployments.gateway.pipeline import Pipeline


class OperatorPages:
    """For tenants with `operator: true` in the keys file; for everybody where there are no keys."""

    def __init__(
        self,
        registry: CollectorRegistry,
        discovery: Callable[[], bytes],
        status: Callable[[], Awaitable[Mapping[str, object]]],
    ) -> None:
        """`discovery` makes the JSON for Prometheus; `status` raises DeepsplitError when no replica answers."""
        self._registry = registry
        self._discovery = discovery
        self._status = status

    def routes(self, pipeline: Pipeline) -> list[Route]:
        """Returns their routes, which raise Unauthenticated or PermissionDenied for others."""

        def page(path: str, show: Callable[[], Awaitable[Response]]) -> Route:
            async def answer(request: Request) -> Response:
                tenant = pipeline.identify(api_key(request.headers))
                if not tenant.operator:
                    raise PermissionDenied(
                        f"tenant {tenant.name} may not see this: set `operator: true` for it in the keys file"
                    )
                return await show()

            return Route(path, answer)

        async def metrics() -> Response:
            return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

        async def discovery() -> Response:
            return Response(self._discovery(), media_type="application/json")

        async def status() -> Response:
            return JSONResponse(dict(await self._status()))

        pages = {"/metrics": metrics, "/sd/prometheus": discovery, "/v1/deepsplit/status": status}
        return [page(path, show) for path, show in pages.items()]
