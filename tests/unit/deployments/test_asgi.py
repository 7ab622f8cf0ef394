from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.asgi import call_asgi
from deployments.fleet import ResponseHead


async def collect(app: Starlette, path: str, body: bytes = b"") -> list[ResponseHead | bytes]:
    return [item async for item in call_asgi(app, "POST", path, body, {"x-request-id": "r1"})]


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"body": (await request.body()).decode(), "id": request.headers["x-request-id"]}, 201)


async def fail(request: Request) -> JSONResponse:
    raise ValueError("broken handler")


async def burst(request: Request) -> StreamingResponse:
    async def parts():  # type: ignore[no-untyped-def]
        for number in range(4):
            yield b"%d" % number
            if number == 1:
                await asyncio.sleep(0.05)

    return StreamingResponse(parts(), media_type="text/event-stream")


APP = Starlette(routes=[Route(f"/{f.__name__}", f, methods=["POST"]) for f in (echo, fail, burst)])


def test_head_then_body() -> None:
    head, body = asyncio.run(collect(APP, "/echo", b"hi"))
    assert head == ResponseHead(201, "application/json")
    assert body == b'{"body":"hi","id":"r1"}'


def test_chunks_that_are_ready_together_come_together_and_none_waits() -> None:
    head, *chunks = asyncio.run(collect(APP, "/burst"))
    assert head == ResponseHead(200, "text/event-stream; charset=utf-8")
    assert b"".join(chunks) == b"0123"  # type: ignore[arg-type]
    assert 2 <= len(chunks) <= 3


def test_an_error_before_the_response_is_raised_after_the_500() -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken app")

    with pytest.raises(ValueError, match="broken app"):
        asyncio.run(collect(bare, "/"))  # type: ignore[arg-type]
    head, _ = asyncio.run(collect(APP, "/fail"))
    assert isinstance(head, ResponseHead)
    assert head.status == 500


@pytest.mark.parametrize("cancelled", [True, False])
def test_leaving_is_a_disconnect_to_the_application(cancelled: bool) -> None:
    """Also to one that shields its work from cancellation, as vLLM's handlers do."""

    async def run() -> None:
        seen = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            seen.set()

        async def read() -> None:
            async for _ in call_asgi(app, "POST", "/", b"", {}):
                pass

        if cancelled:
            task = asyncio.create_task(read())
            await asyncio.sleep(0.01)
            task.cancel()
        else:
            async with aclosing(call_asgi(app, "POST", "/", b"", {})) as answer:
                await anext(answer)
        await asyncio.wait_for(seen.wait(), 1)

    asyncio.run(run())
