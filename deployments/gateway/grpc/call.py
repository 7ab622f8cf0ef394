"""From a gRPC call to the door and back: metadata, deadline, the replica's JSON and its server-sent events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc

from cluster.errors import RequestError, RequestTimeout
from deployments.gateway.door import Answer, Call, Door
from deployments.gateway.grpc.errors import replica_error

SSE = "text/event-stream"
REQUEST_ID = "x-request-id"
_MAX_ID_CHARS = 128


async def ask(
    door: Door, context: grpc.aio.ServicerContext, path: str, body: bytes, request_id: str | None = None
) -> bytes:
    """The replica's whole JSON answer. An empty `body` is a GET. Raises DeepsplitError or ReplicaRefused."""
    async with _answer(door, call_of(context, path, body, request_id), context) as answer:
        return await _read(answer)


async def ask_stream(
    door: Door,
    context: grpc.aio.ServicerContext,
    path: str,
    body: bytes,
    request_id: str | None = None,
    announce: bool = True,
) -> AsyncGenerator[bytes, None]:
    """The data of the answer's events, without the last one, [DONE]. Closing it aborts the generation.

    `announce`: send initial metadata, which a call can do once, before the first. Raises as `ask` does.
    """
    call = call_of(context, path, body, request_id)
    async with _answer(door, call, context) as answer:
        if not answer.content_type.startswith(SSE):
            raise replica_error(500, await _read(answer))
        if announce:
            await context.send_initial_metadata(((REQUEST_ID, call.request_id),))
        async for data in event_data(answer.chunks):
            yield data


async def event_data(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Data of server-sent events, wherever the chunks were cut, up to [DONE]. Comments are dropped."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    yield data


def call_of(context: grpc.aio.ServicerContext, path: str, body: bytes, request_id: str | None) -> Call:
    """Raises RequestError for metadata that is not valid, RequestTimeout if the deadline has passed."""
    metadata = _metadata(context)
    remaining_s: float | None = context.time_remaining()
    if remaining_s is not None and remaining_s <= 0:
        raise RequestTimeout("the call's deadline had passed when it arrived")
    return Call(
        method="POST" if body else "GET",
        path=path,
        body=body,
        request_id=_request_id(request_id or metadata.get(REQUEST_ID, "")),
        key=key_of(context),
        priority=metadata.get("x-deepsplit-priority"),
        timeout_s=remaining_s,
        ttft_s=_seconds(metadata, "x-deepsplit-ttft-s"),
    )


def key_of(context: grpc.aio.ServicerContext) -> str | None:
    """The API key that the call came with."""
    metadata = _metadata(context)
    scheme, _, key = metadata.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key else metadata.get("x-api-key")


@asynccontextmanager
async def _answer(door: Door, call: Call, context: grpc.aio.ServicerContext) -> AsyncIterator[Answer]:
    context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
    answer = await door.answer(call)
    async with aclosing(answer.chunks):
        if answer.status != 200:
            raise replica_error(answer.status, await _read(answer))
        limits = [(name, value) for name, value in answer.headers.items() if name.startswith("x-ratelimit-")]
        context.set_trailing_metadata(((REQUEST_ID, call.request_id), *limits))
        yield answer


def request_id_of(context: grpc.aio.ServicerContext) -> str:
    """The id that the call came with, or a new one."""
    return _request_id(_metadata(context).get(REQUEST_ID, ""))


def _metadata(context: grpc.aio.ServicerContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


async def _read(answer: Answer) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks])


def _request_id(asked: str) -> str:
    # It goes back as metadata, which holds printable ASCII only.
    return asked[:_MAX_ID_CHARS] if asked.isascii() and asked.isprintable() and asked.strip() else uuid.uuid4().hex


def _seconds(metadata: dict[str, str], name: str) -> float | None:
    text = metadata.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"{name} must be a number of seconds above 0, but is {text[:32]!r}")
    return seconds
