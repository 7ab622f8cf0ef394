"""The attention replica's private port over real sockets: who gets in, what it says of itself, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from deployments.attention import private_port as replica_server
from deployments.attention.private_port import LOAD_PATH, ReplicaServer
from routing.requests.request import ReplicaLoad

LOAD = ReplicaLoad("r0", max_num_seqs=4, kv_cache_tokens=100)


class Engine:
    """An application whose answers take as long as the test wants, and the engine's health."""

    def __init__(self) -> None:
        self.alive = True
        self.go_on = asyncio.Event()
        self.ended: list[str] = []

    async def load(self) -> ReplicaLoad:
        if not self.alive:
            raise RuntimeError("dead")
        return LOAD

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b" done"})
            self.ended.append("done")
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


Scenario = Callable[[Engine, ReplicaServer, str, aiohttp.ClientSession], Awaitable[None]]


def run(scenario: Scenario, key: str | None = None) -> None:
    async def bounded() -> None:
        engine = Engine()
        server = ReplicaServer(engine.app, engine.load, None)
        url = await server.start("127.0.0.1")
        headers = {"authorization": f"Bearer {server.token}" if key is None else key}
        async with asyncio.timeout(20), aiohttp.ClientSession(headers=headers) as client:
            try:
                await scenario(engine, server, url, client)
            finally:
                engine.go_on.set()
                await server.stop(0.1)

    asyncio.run(bounded())


@pytest.mark.parametrize("key", ["", "Bearer ", "Bearer wrong", "Basic x"])
def test_strangers_learn_nothing(key: str) -> None:
    async def scenario(engine: Engine, server: ReplicaServer, url: str, client: aiohttp.ClientSession) -> None:
        for path in (LOAD_PATH, "/v1/models"):
            async with client.get(url + path) as response:
                assert response.status == 401
                assert b"r0" not in await response.read()

    run(scenario, key)


def test_it_says_what_it_has_to_do_until_it_drains() -> None:
    async def scenario(engine: Engine, server: ReplicaServer, url: str, client: aiohttp.ClientSession) -> None:
        async with client.get(url + LOAD_PATH) as response:
            for _ in range(2):
                assert msgspec.json.decode(await response.content.readline(), type=ReplicaLoad) == LOAD
            stopping = asyncio.create_task(server.stop(5))
            await response.read()  # ends as it should: requests in flight are not lost
        await stopping

    run(scenario)


def test_a_dead_engine_breaks_the_load_stream_off() -> None:
    async def scenario(engine: Engine, server: ReplicaServer, url: str, client: aiohttp.ClientSession) -> None:
        async with client.get(url + LOAD_PATH) as response:
            await response.content.readline()
            engine.alive = False
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
        async with client.get(url + LOAD_PATH) as response:
            assert response.status == 503

    run(scenario)


def test_what_runs_may_end_within_the_grace() -> None:
    async def scenario(engine: Engine, server: ReplicaServer, url: str, client: aiohttp.ClientSession) -> None:
        async with client.post(url + "/v1/completions") as response:
            assert await response.content.read(5) == b"begun"
            stopping = asyncio.create_task(server.stop(10))
            await asyncio.sleep(replica_server.LOAD_INTERVAL_S)
            engine.go_on.set()
            assert await response.read() == b" done"
        await stopping
        assert engine.ended == ["done"]

    run(scenario)


def test_what_does_not_end_within_the_grace_is_broken_off() -> None:
    async def scenario(engine: Engine, server: ReplicaServer, url: str, client: aiohttp.ClientSession) -> None:
        async with client.post(url + "/v1/completions") as response:
            assert await response.content.read(5) == b"begun"
            await server.stop(0.1)
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        assert engine.ended == ["cancelled"]

    run(scenario)
