"""The HTTP server on real sockets, against peers that do not play by the rules."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from starlette.types import Receive, Scope, Send

from cluster.errors import StartupError
from deployments.hosting import http_connection
from deployments.hosting.http_server import HttpServer

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Application:
    """Answers with `size` bytes in pieces of 64 KiB; `hold` keeps requests open until it is set."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.hold = asyncio.Event()
        self.hold.set()
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            await self.hold.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for at in range(0, self.size, 65536):
                piece = b"x" * min(65536, self.size - at)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.running -= 1


@asynccontextmanager
async def served(app: Application) -> AsyncIterator[int]:
    server = HttpServer(app)
    port = await server.start("127.0.0.1", 0, "gateway.port")
    try:
        yield port
    finally:
        await server.stop(0.5)


def talk(app_size: int, talk: Callable[[int, Application], Awaitable[None]]) -> None:
    async def run() -> None:
        app = Application(app_size)
        async with served(app) as port:
            await talk(port, app)
            # Whatever the peer did, the next one is served.
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
            writer.close()

    asyncio.run(run())


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        return await reader.read()


async def until_refused(port: int) -> None:
    async with asyncio.timeout(20):
        with suppress(ConnectionRefusedError):
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.02)


def test_headers_without_end_are_refused_at_their_bound() -> None:
    async def huge(port: int, _: Application) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx-filler: ")
        try:
            for _chunk in range(1000):  # 64 MB if nobody stops it
                writer.write(b"a" * 65536)
                await writer.drain()
        except ConnectionError:
            return
        raise AssertionError("all of it was read")

    talk(2, huge)


def test_a_large_body_in_the_same_packet_is_no_header() -> None:
    async def body(port: int, _: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"b" * 200_000)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()

    talk(2, body)


def test_a_peer_that_never_ends_its_headers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADER_TIMEOUT_S", 1.0)

    async def slow(port: int, _: Application) -> None:
        silent, _writer = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nho")
        assert await until_closed(reader) == b""
        assert await until_closed(silent) == b""
        again, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)  # a second request on a kept connection is under the same bound
        await again.readuntil(b"0\r\n\r\n")
        writer.write(b"GET / HT")
        assert await until_closed(again) == b""

    talk(2, slow)


def test_a_reader_that_stalls_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "WRITE_STALL_S", 0.3)

    async def stall(port: int, app: Application) -> None:
        raw = socket.create_connection(("127.0.0.1", port))
        raw.sendall(GET)
        async with asyncio.timeout(20):
            while not app.running:
                await asyncio.sleep(0.01)
            while app.running:
                await asyncio.sleep(0.01)
        raw.close()

    talk(64 << 20, stall)


def test_stop_lets_a_running_request_end_within_the_grace() -> None:
    async def run() -> bytes:
        app = Application()
        app.hold.clear()
        server = HttpServer(app)
        port = await server.start("127.0.0.1", 0, "gateway.port")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        while not app.running:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(server.stop(20))
        await until_refused(port)
        app.hold.set()
        answer = await reader.read()
        await stopping
        return answer

    assert asyncio.run(run()).endswith(b"2\r\nxx\r\n0\r\n\r\n")


def test_a_port_in_use_names_the_key_and_a_shared_one_is_shared() -> None:
    async def run() -> None:
        first, second, third = HttpServer(Application()), HttpServer(Application()), HttpServer(Application())
        port = await first.start("127.0.0.1", 0, "gateway.port", share_port=True)
        assert await second.start("127.0.0.1", port, "gateway.port", share_port=True) == port
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use; see gate"):
            await third.start("127.0.0.1", port, "gateway.port")
        await first.stop(0)
        await second.stop(0)

    asyncio.run(run())


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.77:0: .*; see gateway\.port"):
        asyncio.run(HttpServer(Application()).start("192.0.2.77", 0, "gateway.port"))
