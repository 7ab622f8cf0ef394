"""The same small gateway in three places, for `benchmarks.serve_proxy`: only who listens and how it sends on differ."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import aiohttp
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from benchmarks.serve_proxy.token_source import TokenSource
from deployments.hosting.http_server import HttpServer


@dataclass(frozen=True)
class Status:
    """First item of an answer; chunks of the body follow."""

    status: int
    content_type: str


Send = Callable[[str, str, bytes, str], AsyncGenerator[Status | bytes, None]]
_DEPLOY = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 1000}


def forwarding_app(send: Send) -> Starlette:
    """Passes requests on, bytes untouched, without any policy."""

    async def handle(request: Request) -> Response:
        request_id = request.headers.get("x-request-id", "")
        answer = send(request.method, "/" + request.path_params["path"], await request.body(), request_id)
        head = await anext(answer)
        assert isinstance(head, Status)
        if not head.content_type.startswith("text/event-stream"):
            async with aclosing(answer):
                body = b"".join([chunk async for chunk in answer if isinstance(chunk, bytes)])
            return Response(body, head.status, {"content-type": head.content_type})
        return StreamingResponse(_chunks(answer), head.status, {"content-type": head.content_type})

    return Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST"])])


async def _chunks(answer: AsyncGenerator[Status | bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(answer):
        async for chunk in answer:
            assert isinstance(chunk, bytes)
            yield chunk


class OverHttp:
    """Asks the source over HTTP, on connections that stay open."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def send(self, method: str, path: str, body: bytes, request_id: str) -> AsyncGenerator[Status | bytes, None]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        headers = {"content-type": "application/json", "x-request-id": request_id}
        async with self._session.request(method, self._url + path, data=body, headers=headers) as answer:
            yield Status(answer.status, answer.headers["content-type"])
            async for chunk in answer.content.iter_any():
                yield chunk


class OverHandle:
    """Asks a replica over Serve's own streaming call."""

    def __init__(self, replica: DeploymentHandle) -> None:
        self._replica = replica.options(stream=True)

    async def send(self, method: str, path: str, body: bytes, request_id: str) -> AsyncGenerator[Status | bytes, None]:
        answer = self._replica.http.remote(method, path, body, request_id)
        ended = False
        try:
            async for item in answer:
                yield item
            ended = True
        finally:
            if not ended:
                answer.cancel()


@serve.deployment(**_DEPLOY)
class SourceReplica:
    """The source in process, as vLLM's application would be in an attention replica."""

    def __init__(self) -> None:
        self._source = TokenSource()

    async def http(self, method: str, path: str, body: bytes, request_id: str) -> AsyncGenerator[Status | bytes, None]:
        if method == "GET":
            yield Status(200, "application/json")
            yield json.dumps(self._source.left_s(path.rpartition("/")[2])).encode()
            return
        asked = json.loads(body)
        if not asked["stream"]:
            yield Status(200, "application/json")
            yield json.dumps(self._source.whole(asked)).encode()
            return
        yield Status(200, "text/event-stream")
        async with aclosing(self._source.stream(asked, request_id)) as events:
            async for event in events:
                yield event


@serve.deployment(**_DEPLOY)
@serve.ingress()
class Ingress:
    """Serve's proxy listens. Sends on over HTTP to a source's URL, or over a handle to a SourceReplica."""

    def __init__(self, source: str | DeploymentHandle) -> None:
        self._send = OverHttp(source).send if isinstance(source, str) else OverHandle(source).send

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return forwarding_app(self._send)


@serve.deployment(**_DEPLOY)
class OwnPort:
    """Listens itself, sends on over HTTP. Serve only starts, checks and stops it."""

    async def __init__(self, source: str) -> None:
        self._server = HttpServer(forwarding_app(OverHttp(source).send))
        self._port = await self._server.start("127.0.0.1", 0, "the benchmark's port")

    def port(self) -> int:
        return self._port
