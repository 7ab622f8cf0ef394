"""An application to serve, and peers that talk to it over raw sockets."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.hosting.http_connection import DEFAULT_BOUNDS, ConnectionBounds
from deployments.hosting.http_server import HttpServer

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


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


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says what it was asked, in one piece of known length or, where the path is /stream, in two of unknown length."""
    body = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request", "the peer went away"
        body += message["body"]
        if not message["more_body"]:
            break
    names = [name.decode() for name, _ in scope["headers"]]
    seen = {"method": scope["method"], "path": scope["path"], "body": body.decode(), "names": names}
    said = json.dumps(seen).encode()
    streamed = scope["path"] == "/stream"
    headers = [] if streamed else [(b"content-length", str(len(said)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for piece in (said[:10], said[10:], b"") if streamed else (said,):
        await send({"type": "http.response.body", "body": piece, "more_body": streamed and bool(piece)})


@asynccontextmanager
async def served(
    app: ASGIApp, bounds: ConnectionBounds = DEFAULT_BOUNDS, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    server = HttpServer(app, tls, bounds)
    port = await server.start("127.0.0.1", 0, "gateway.port")
    try:
        yield port
    finally:
        await server.stop(0.5)


def talk(
    app_size: int, talk: Callable[[int, Application], Awaitable[None]], bounds: ConnectionBounds = DEFAULT_BOUNDS
) -> None:
    async def run() -> None:
        app = Application(app_size)
        async with served(app, bounds) as port:
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


