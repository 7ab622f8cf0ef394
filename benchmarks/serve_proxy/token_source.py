"""Tokens at a fixed pace over HTTP and nothing else: what the ways to it are measured with.

POST /v1/completions {"max_tokens", "pace_ms", "stream"}; each event carries the time at which it was sent.
GET /left/{request id}: when that stream's client was noticed to be gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import TypedDict

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments.hosting.http_server import HttpServer


class TokenRequest(TypedDict):
    """A request's body."""

    max_tokens: int
    pace_ms: float  # only of streams
    stream: bool


class TokenSource:
    """`app` is the ASGI application."""

    def __init__(self) -> None:
        self._left_s: dict[str, float] = {}
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/left/{request_id}", self._left),
            ]
        )

    def whole(self, asked: TokenRequest) -> dict[str, object]:
        """The answer in one piece, at once."""
        return {"choices": [{"index": 0, "text": " token" * asked["max_tokens"]}]}

    async def stream(self, asked: TokenRequest, request_id: str) -> AsyncGenerator[bytes, None]:
        """The answer as events, at the pace that was asked for."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        finished = False
        try:
            for token in range(asked["max_tokens"]):
                await asyncio.sleep(begun_s + (token + 1) * asked["pace_ms"] / 1e3 - loop.time())
                event = {"choices": [{"index": 0, "text": f" {token}"}], "sent_s": time.monotonic()}
                yield f"data: {json.dumps(event)}\n\n".encode()
            yield b"data: [DONE]\n\n"
            finished = True
        finally:
            if not finished:
                self._left_s[request_id] = time.monotonic()

    def left_s(self, request_id: str) -> float | None:
        """When the stream's client was noticed to be gone (`time.monotonic`)."""
        return self._left_s.get(request_id)

    async def _complete(self, request: Request) -> Response:
        asked: TokenRequest = json.loads(await request.body())
        if not asked["stream"]:
            return JSONResponse(self.whole(asked))
        events = self.stream(asked, request.headers.get("x-request-id", ""))
        return StreamingResponse(events, media_type="text/event-stream")

    async def _left(self, request: Request) -> Response:
        return JSONResponse(self.left_s(request.path_params["request_id"]))


def serve(address: str, port: int) -> None:
    """Run a source until the process is killed."""

    async def run() -> None:
        await HttpServer(TokenSource().app).start(address, port, "the benchmark's source port")
        await asyncio.Event().wait()

    asyncio.run(run())
