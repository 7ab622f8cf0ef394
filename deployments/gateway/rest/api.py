"""The REST API as an ASGI application: HTTP to the pipeline and back. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster.config import GatewayConfig
from cluster.errors import ClientGone, DeepsplitError
from deployments.gateway.body import read_body
from deployments.gateway.head import Head, read_head
from deployments.gateway.models import ModelPages
from deployments.gateway.openapi import ServerDescription
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.paths import MODELS, POST_PATHS
from deployments.gateway.pipeline import Pipeline
from deployments.gateway.rest.errors import error_response, http_error_response
from deployments.gateway.rest.middleware import EveryRequest, cors, reported
from deployments.gateway.rest.writer import AnswerWriter
from deployments.hosting.http_server import until_disconnect


class RestApi:
    """Routes and handlers. `app` is the ASGI application."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: GatewayConfig,
        models: ModelPages,
        pages: OperatorPages,
        description: ServerDescription,
    ) -> None:
        self._pipeline = pipeline
        self._models = models
        self._description = description
        self.app = Starlette(
            routes=[
                Route("/health", self._alive),
                Route("/ping", self._alive),
                Route("/ready", self._ready),
                Route("/version", self._version),
                Route("/openapi.json", self._openapi),
                *pages.routes(pipeline),
                Route(MODELS, self._list_models),
                Route(MODELS + "/{model:path}", self._retrieve_model),
                *(Route(path, _PipelineEndpoint(path, pipeline, config), methods=["POST"]) for path in POST_PATHS),
            ],
            middleware=[*cors(config.cors_origins), Middleware(EveryRequest)],
            exception_handlers={DeepsplitError: _on_deepsplit_error, HTTPException: _on_http_exception},
        )
        self.app.router.redirect_slashes = False

    async def _alive(self, request: Request) -> Response:
        return Response()

    async def _ready(self, request: Request) -> Response:
        models = dict(self._pipeline.ready())
        return JSONResponse({"models": models}, 200 if all(models.values()) else 503)

    async def _version(self, request: Request) -> Response:
        return JSONResponse(dict(await self._description.versions()))

    async def _openapi(self, request: Request) -> Response:
        return Response(await self._description.openapi(), media_type="application/json")

    async def _list_models(self, request: Request) -> Response:
        async with self._pipeline.open(_head(request, MODELS)) as lease:
            lease.status = 200
            return JSONResponse({"object": "list", "data": self._models.visible(lease.tenant)})

    async def _retrieve_model(self, request: Request) -> Response:
        async with self._pipeline.open(_head(request, MODELS + "/{model}")) as lease:
            model = self._models.retrieve(lease.tenant, request.path_params["model"])
            lease.status = 200
            return JSONResponse(model)


class _PipelineEndpoint:
    """One path whose requests go to attention replicas: authenticate, read, outline, admission, attempts, write."""

    def __init__(self, path: str, pipeline: Pipeline, config: GatewayConfig) -> None:
        self._path = path
        self._pipeline = pipeline
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        head = _head(request, self._path)
        writer = AnswerWriter(self._path, send, self._config.sse_comment_interval_s)
        try:
            async with self._pipeline.open(head) as lease:
                encodings = ",".join(request.headers.getlist("content-encoding"))
                limit_bytes, declared = self._config.max_body_mib * 2**20, request.headers.get("content-length", "")
                body = await read_body(lease, _chunks(request), encodings, limit_bytes, declared)
                async with _while_connected(receive):
                    outlined = await self._pipeline.outline(lease, body)
                    await writer.write(self._pipeline.run(lease, outlined, body), outlined.stream)
        except ClientGone:
            pass  # nobody is left to tell
        except DeepsplitError as error:
            await writer.fail(error)
        except Exception as bug:
            await writer.fail(reported(bug, head.request_id))


def _head(request: Request, path: str) -> Head:
    return read_head(request.method, path, request.headers, request_id=request.state.request_id)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise ClientGone("the client went away while it sent its request") from error


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Raises ClientGone, in the middle of whatever is done, when the client goes away."""
    loop = asyncio.get_running_loop()
    within = True
    try:
        async with asyncio.timeout(None) as connection:

            def gone(_: asyncio.Task[None]) -> None:
                if within and not connection.expired():
                    connection.reschedule(loop.time())

            leaving = loop.create_task(until_disconnect(receive))
            leaving.add_done_callback(gone)
            try:
                yield
            finally:
                within = False
                leaving.cancel()
    except TimeoutError as error:
        raise ClientGone("the client went away") from error


def _on_deepsplit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeepsplitError)
    return error_response(request.url.path, error)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = error.detail.lower().replace(" ", "_")
    headers = dict(error.headers) if error.headers else None
    return http_error_response(request.url.path, error.status_code, message, code, headers)
