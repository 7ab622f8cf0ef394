"""Writes one answer to an HTTP client: whole, or as server-sent events without waiting for more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager

from starlette.types import Send

from cluster.errors import DeepsplitError
from deployments.gateway.pipeline import Answer
from deployments.gateway.rest.errors import error_event, error_response, event_of
from deployments.gateway.upstream import sse

_COMMENT = b": waiting\n\n"
_EVENT_STREAM = sse.CONTENT_TYPE + "; charset=utf-8"
# Proxies that buffer would undo the flush per token.
_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AnswerWriter:
    """One response. Belongs to the task that handles the request."""

    def __init__(self, path: str, send: Send, comment_interval_s: float | None) -> None:
        """`comment_interval_s`: how often a stream that has nothing to say says so; None: never."""
        self._path = path
        self._send = send
        self._comment_interval_s = comment_interval_s
        self._writing = asyncio.Lock()  # comments come in between
        self._written_s = 0.0
        self._started = False
        self._ended = False

    async def write(self, answering: AbstractAsyncContextManager[Answer], streamed: bool) -> None:
        """Waits for the answer and writes it. `streamed`: whether the client asked for a stream."""
        with self._comments(streamed):
            async with answering as answer:
                headers = {"content-type": answer.content_type, **answer.headers}
                if answer.content_type.startswith(sse.CONTENT_TYPE):
                    await self._write(answer.status, headers | _UNBUFFERED)
                    async for chunk in answer.chunks:
                        await self._write_body(chunk)
                    await self._write_body(b"", last=True)
                    return
                whole = b"".join([chunk async for chunk in answer.chunks])
            if self._started:  # by a comment: the status line is gone
                await self._write_body(event_of(self._path, answer.status, whole), last=True)
            else:
                await self._write(answer.status, headers | {"content-length": str(len(whole))}, whole, last=True)

    async def fail(self, error: DeepsplitError) -> None:
        """The answer ends with an error: as a response of its own, or in the middle of a stream as its last event."""
        if self._started:
            await self._write_body(error_event(self._path, error), last=True)
            return
        response = error_response(self._path, error)
        await self._write(response.status_code, dict(response.headers), bytes(response.body), last=True)

    @contextmanager
    def _comments(self, streamed: bool) -> Iterator[None]:
        """Keeps a quiet stream's connection from being closed by proxies on the way."""
        if not streamed or self._comment_interval_s is None:
            yield
            return
        commenting = asyncio.create_task(self._comment(self._comment_interval_s))
        try:
            yield
        finally:
            commenting.cancel()

    async def _comment(self, interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._written_s = loop.time()
        while True:
            await asyncio.sleep(self._written_s + interval_s - loop.time())
            if loop.time() >= self._written_s + interval_s:
                await self._write(200, {"content-type": _EVENT_STREAM, **_UNBUFFERED}, _COMMENT)

    async def _write_body(self, body: bytes, last: bool = False) -> None:
        await self._write(200, {}, body, last)

    async def _write(self, status: int, headers: Mapping[str, str], body: bytes = b"", last: bool = False) -> None:
        """A part of the body; before the first one its head, which is ignored later."""
        async with self._writing:
            if self._ended:
                return
            if not self._started:
                pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
                await self._send({"type": "http.response.start", "status": status, "headers": pairs})
                self._started = True
            if body or last:
                await self._send({"type": "http.response.body", "body": body, "more_body": not last})
                self._ended = last
            self._written_s = asyncio.get_running_loop().time()
