"""Writes one answer to an HTTP client: whole, or as server-sent events without waiting for more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from starlette.types import Send

from cluster.errors import DeepsplitError
from deployments.gateway.pipeline import AnswerHead
from deployments.gateway.rest.errors import error_event, error_response, event_of
from deployments.gateway.upstream import sse

_COMMENT = b": waiting\n\n"
_EVENT_STREAM = sse.CONTENT_TYPE + "; charset=utf-8"
# Proxies that buffer would undo the flush per token.
_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AnswerWriter:
    """One response. Belongs to the task that handles the request."""

    def __init__(self, path: str, send: Send, comment_interval_s: float | None) -> None:
        """`comment_interval_s`: how often a stream that still waits says so; None: never."""
        self._path = path
        self._send = send
        self._comment_interval_s = comment_interval_s
        self._started = False

    async def write(self, items: AsyncGenerator[AnswerHead | bytes, None], streamed: bool) -> None:
        """`items`: the answer's head and then its chunks. `streamed`: whether the client asked for a stream."""
        head = await self._first(items, streamed and self._comment_interval_s is not None)
        assert isinstance(head, AnswerHead), "an answer begins with its head"
        if head.content_type.startswith(sse.CONTENT_TYPE):
            await self._start(head.status, head.content_type, {**head.headers, **_UNBUFFERED})
            async for chunk in items:
                assert isinstance(chunk, bytes), "an answer has one head"
                await self._body(chunk, more=True)
            await self._body(b"", more=False)
            return
        whole = b"".join([chunk async for chunk in items if isinstance(chunk, bytes)])
        if self._started:  # a comment has been sent: the status line is gone
            await self._body(event_of(self._path, whole), more=False)
            return
        headers = {**head.headers, "content-length": str(len(whole))}
        await self._start(head.status, head.content_type, headers)
        await self._body(whole, more=False)

    async def fail(self, error: DeepsplitError) -> None:
        """The answer ends with an error: as a response of its own, or in the middle of a stream as its last event."""
        if self._started:
            await self._body(error_event(self._path, error), more=False)
            return
        response = error_response(self._path, error)
        await self._start(response.status_code, None, dict(response.headers))
        await self._body(bytes(response.body), more=False)

    async def _first(
        self, items: AsyncGenerator[AnswerHead | bytes, None], comments: bool
    ) -> AnswerHead | bytes:
        if not comments:
            return await anext(items)
        coming = asyncio.ensure_future(anext(items))
        try:
            while True:
                await asyncio.wait((coming,), timeout=self._comment_interval_s)
                if coming.done():
                    return coming.result()
                if not self._started:
                    await self._start(200, _EVENT_STREAM, _UNBUFFERED)
                await self._body(_COMMENT, more=True)
        finally:
            if not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError, DeepsplitError, StopAsyncIteration):
                    await coming

    async def _start(self, status: int, content_type: str | None, headers: Mapping[str, str]) -> None:
        if self._started:
            return
        self._started = True
        pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        if content_type is not None:
            pairs.append((b"content-type", content_type.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def _body(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
