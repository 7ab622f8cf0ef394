"""The REST API as an ASGI application: HTTP to the pipeline and back. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.config import GatewayConfig
from cluster.errors import ClientGone, DeepsplitError
from deployments.gateway.body import read_body
from deployments.gateway.head import REQUEST_ID, clean_id, read_head
from deployments.gateway.models import ModelPages
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.pipeline import GENERATE_PATHS, OTHER_PATHS, Pipeline
from deployments.gateway.rest.errors import error_response, http_error_response
from deployments.gateway.rest.writer import AnswerWriter

POST_PATHS = (*GENERATE_PATHS, *OTHER_PATHS)
GET_PATHS = ("/v1/models", "/v1/models/{model:path}")


class RestApi:
    """Routes and handlers. `app` is the ASGI application."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: GatewayConfig,
        models: ModelPages,
        pages: OperatorPages,
        openapi: Callable[[], Awaitable[bytes]],
    ) -> None:
        """`openapi` raises DeepsplitError when no replica answers."""
        self._pipeline = pipeline
        self._config = config
        self._models = models
        self._openapi_source = openapi
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/openapi.json", self._openapi),
                *pages.routes(pipeline),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{model:path}", self._retrieve_model),
                *(Route(path, _PipelineEndpoint(path, pipeline, config), methods=["POST"]) for path in POST_PATHS),
            ],
            middleware=[Middleware(_RequestIds)],
            exception_handlers={
                DeepsplitError: _on_deepsplit_error,
                HTTPException: _on_http_exception,
                Exception: _on_bug,
            },
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _ready(self, request: Request) -> Response:
        models = dict(self._pipeline.ready())
        return JSONResponse({"models": models}, 200 if all(models.values()) else 503)

    async def _openapi(self, request: Request) -> Response:
        return Response(await self._openapi_source(), media_type="application/json")

    async def _list_models(self, request: Request) -> Response:
        async with self._pipeline.open(read_head("GET", "/v1/models", request.headers)) as lease:
            lease.status = 200
            return JSONResponse({"object": "list", "data": self._models.visible(lease.tenant)})

    async def _retrieve_model(self, request: Request) -> Response:
        async with self._pipeline.open(read_head("GET", "/v1/models/{model}", request.headers)) as lease:
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
        head = read_head("POST", self._path, request.headers, request_id=request.state.request_id)
        writer = AnswerWriter(self._path, send, self._config.sse_comment_interval_s)
        try:
            async with self._pipeline.open(head) as lease:
                encoding = request.headers.get("content-encoding", "")
                body = await read_body(lease, _chunks(request), encoding, self._config.max_body_mib * 2**20)
                async with _while_connected(receive):
                    outlined = await self._pipeline.outline(lease, body)
                    async with aclosing(self._pipeline.run(lease, outlined, body)) as items:
                        await writer.write(items, outlined.stream)
        except ClientGone:
            pass  # nobody is left to tell
        except DeepsplitError as error:
            await writer.fail(error)


class _RequestIds:
    """Every request has an id, the client's if it sent one, and every response shows it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = clean_id(Headers(scope=scope).get(REQUEST_ID, ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


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
    try:
        async with asyncio.timeout(None) as connection:

            def gone(_: asyncio.Task[None]) -> None:
                if not connection.expired():
                    connection.reschedule(loop.time())

            leaving = loop.create_task(_until_disconnect(receive))
            leaving.add_done_callback(gone)
            try:
                yield
            finally:
                leaving.remove_done_callback(gone)
                leaving.cancel()
    except TimeoutError as error:
        raise ClientGone("the client went away") from error


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _on_deepsplit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeepsplitError)
    return error_response(request.url.path, error)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = error.detail.lower().replace(" ", "_")
    headers = dict(error.headers) if error.headers else None
    return http_error_response(request.url.path, error.status_code, message, code, headers)


def _on_bug(request: Request, error: Exception) -> Response:
    return http_error_response(request.url.path, 500, "internal error of the gateway", "internal_error", None)
