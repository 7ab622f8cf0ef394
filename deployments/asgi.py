"""Calls an ASGI application in process and yields its answer piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping

from starlette.types import ASGIApp, Message, Scope

from deployments.fleet import ResponseHead

DISCONNECT_GRACE_S = 5.0

_logger = logging.getLogger(__name__)


async def call_asgi(
    app: ASGIApp, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> AsyncGenerator[ResponseHead | bytes, None]:
    """Yield a ResponseHead and then the body's chunks. Chunks that are ready together come as one.

    Closing or cancelling the generator is the client's disconnect to the application, which has DISCONNECT_GRACE_S to
    wind up before its task is cancelled. An exception of the application that cuts its response short is raised here.
    """
    # Holds at most one completion: an application that streams faster than we are read is not held up.
    ready: asyncio.Queue[Message | None] = asyncio.Queue()
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Message:
        if request:
            return request.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(method, path, headers), receive, ready.put)
        finally:
            ready.put_nowait(None)

    task = asyncio.create_task(run())
    task.add_done_callback(_log_error)
    complete = False
    try:
        message = await ready.get()
        while message is not None:
            if message["type"] == "http.response.start":
                content_type = dict(message["headers"]).get(b"content-type", b"application/json")
                yield ResponseHead(message["status"], content_type.decode("latin-1"))
                message = await ready.get()
                continue
            chunks: list[bytes] = []
            while message is not None:
                chunks.append(message.get("body", b""))
                complete = not message.get("more_body", False)
                if complete or ready.empty():
                    break
                message = ready.get_nowait()
            if chunk := b"".join(chunks):
                yield chunk
            if message is None or complete:
                break
            message = await ready.get()
        if not complete:
            await task
    finally:
        # vLLM's handlers shield their work from being cancelled; what they heed is the disconnect message.
        gone.set()
        if not task.done():
            asyncio.get_running_loop().call_later(DISCONNECT_GRACE_S, task.cancel)


def _log_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _logger.error("a request's handler failed", exc_info=error)


def _scope(method: str, path: str, headers: Mapping[str, str]) -> Scope:
    base = {"content-type": "application/json", "host": "attention"}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in (base | dict(headers)).items()],
        "client": None,
        "server": None,
    }
