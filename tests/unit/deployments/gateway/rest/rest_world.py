"""The REST application over a whole pipeline with replicas that answer by script, in this process or on a real port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.types import Message

from cluster.errors import NoCapacity, Plane, Reason
from cluster.keys.api_keys import key_hash
from deployments.gateway.models import ModelPages
from deployments.gateway.openapi import ServerDescription
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.paths import POST_PATHS
from deployments.gateway.rest.api import RestApi
from deployments.hosting.http_server import HttpServer
from tests.unit.deployments.gateway.gateway_world import COMPLETIONS, JSON, FakePool, Script, World

CREATED = 1_700_000_000
REPLY = b'{ "id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2} }'
ANSWER: Script = [JSON, REPLY]
OPERATOR_KEY, GUEST_KEY = "ds-operator", "ds-guest"


class RestWorld(World):
    """A gateway but for Ray, its ports and its replicas."""

    def __init__(self, pool: FakePool, keys: Path | None = None, models: tuple[str, ...] = ("tiny",), **limits: object):
        super().__init__(pool, keys, models=models, **limits)  # type: ignore[arg-type]
        self.engine_pages = {"/openapi.json": b'{"openapi": "3.1.0", "paths": {}}', "/version": b'{"version": "0.9"}'}
        pages = OperatorPages(self.registry, lambda: b'[{"targets": []}]', self._status)
        description = ServerDescription("1.2", POST_PATHS, self._engine_page)
        self.app = RestApi(
            self.pipeline, self.config, ModelPages(models, CREATED, pool.loads), pages, description
        ).app  # fmt: skip

    async def _status(self) -> Mapping[str, object]:
        return {"model": "tiny"}

    async def _engine_page(self, path: str) -> bytes:
        if not self.engine_pages:
            raise NoCapacity("nobody", retry_after_s=5.0, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA)
        return self.engine_pages[path]

    def client(self) -> httpx.AsyncClient:
        """A client of the application in this process, which has an answer only once it is whole."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway")

    @asynccontextmanager
    async def served(self) -> AsyncIterator[int]:
        """The application on a port of its own."""
        server = HttpServer(self.app)
        port = await server.start("127.0.0.1", 0, "gateway.port")
        try:
            yield port
        finally:
            await server.stop(0.5)

    async def until_nothing_left(self) -> None:
        """What a client that went away had is freed within moments."""
        async with asyncio.timeout(10):
            while not self.nothing_left() or self.pool.closed < len(self.pool.seen):
                await asyncio.sleep(0.01)


def request(
    world: RestWorld, method: str, path: str, headers: Mapping[str, str] | None = None, content: bytes | None = None
) -> httpx.Response:
    """One request; it leaves nothing behind."""

    async def run() -> httpx.Response:
        async with world.client() as http, asyncio.timeout(30):
            return await http.request(method, path, content=content, headers=headers)

    answer = asyncio.run(run())
    assert world.nothing_left()
    return answer


def get(world: RestWorld, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
    return request(world, "GET", path, headers)


def post(
    world: RestWorld,
    fields: Mapping[str, object] | bytes | None = None,
    path: str = COMPLETIONS,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    return request(world, "POST", path, headers, body_of(path, fields))


def body_of(path: str, fields: Mapping[str, object] | bytes | None = None) -> bytes:
    """A valid body for a path, with further fields; bytes are one as they are."""
    if isinstance(fields, bytes):
        return fields
    message = {"role": "user", "content": "ab"}
    least: Mapping[str, object] = {
        "/v1/completions": {"prompt": "ab"},
        "/v1/responses": {"input": "ab"},
        "/v1/messages": {"messages": [message], "max_tokens": 4},
        "/tokenize": {"prompt": "ab"},
        "/detokenize": {"tokens": [1]},
    }.get(path, {"messages": [message]})
    return json.dumps({**least, **(fields or {})}).encode()


def keys_file(folder: Path) -> Path:
    """Keys of an operator and of a guest who may do nothing special."""
    file = folder / "keys.yaml"
    file.write_text(
        f"tenants:\n  - name: boss\n    keys: ['{key_hash(OPERATOR_KEY)}']\n    operator: true\n"
        f"  - name: guest\n    keys: ['{key_hash(GUEST_KEY)}']\n    models: [another]\n"
    )
    file.chmod(0o600)
    return file


async def call(
    world: RestWorld,
    path: str = COMPLETIONS,
    content: bytes = b"",
    leave_after: int | None = None,
    leave: asyncio.Event | None = None,
    whole_body: bool = True,
    turns: int | None = None,
) -> list[Message]:
    """The application called as a server does. The client goes away when `leave` is set, or after so many messages:
    the last one takes 10 ms then, or so many turns of the loop.
    """
    sent: list[Message] = []
    gone = asyncio.Event() if leave is None else leave
    requests: list[Message] = [{"type": "http.request", "body": content, "more_body": not whole_body}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()
            for _ in range(turns or 0):
                await asyncio.sleep(0)
            if turns is None:
                await asyncio.sleep(0.01)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [], "client": None, "server": None,
    }  # fmt: skip
    async with asyncio.timeout(20):
        await world.app(scope, receive, send)
    return sent


async def endless(text: bytes = b" ") -> AsyncGenerator[bytes, None]:
    """A body that never ends, in pieces of 64 KiB."""
    while True:
        yield text * 65536
