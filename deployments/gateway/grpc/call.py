"""One request of a gRPC call in the pipeline: a JSON body in, the replica's JSON or its server-sent events out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import grpc
from google.protobuf.message import Message

from cluster.errors import ClientGone, RequestTimeout
from deployments.gateway.grpc.errors import Metadata, replica_error
from deployments.gateway.head import REQUEST_ID, Head, clean_id, read_head
from deployments.gateway.lease import Lease
from deployments.gateway.open_requests import Session
from deployments.gateway.pipeline import Pipeline
from deployments.gateway.upstream import sse

_STALL_BYTES = 64 * 1024  # of a message, for which a client has gateway.write_stall_s
_CANCELLATION_S = 0.01  # gRPC says that nothing more comes of a cancelled call too, just before it cancels its task


class CallContext:
    """A gRPC call: its metadata, and how its messages are read and written."""

    def __init__(self, context: grpc.aio.ServicerContext, write_stall_s: float) -> None:
        """`write_stall_s`: until a client that reads nothing is given up. gRPC tells nothing of how far a message is,
        so one of several times _STALL_BYTES has as many times as long.
        """
        self.context = context
        self._write_stall_s = write_stall_s
        self._metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}

    def head(self, path: str, request_id: str = "") -> Head:
        """The head of a request on this call. `request_id`: the message's own, where it has one."""
        head = read_head("POST", path, self._metadata, self.context.time_remaining(), request_id)
        self.end_with(head)
        return head

    def end_with(self, head: Head, limits: Metadata = ()) -> None:
        """Trailing metadata: the request's id, and where the tenant's budgets stand."""
        self.context.set_trailing_metadata(((REQUEST_ID, head.request_id), *limits))

    async def announce(self, head: Head) -> None:
        """Send initial metadata, which a call can do once, before its first message."""
        await self._written(self.context.send_initial_metadata(((REQUEST_ID, head.request_id),)), 0)

    async def read(self) -> bytes | None:
        """The next message as it came; None when the client sends no more."""
        raw = await self.context.read()
        if raw is not grpc.aio.EOF:
            return raw
        await asyncio.sleep(_CANCELLATION_S)
        return None

    async def write(self, message: Message) -> None:
        """Sends a message. Raises RequestTimeout when the client reads nothing, or too slowly; ClientGone."""
        await self._written(self.context.write(message), message.ByteSize())

    async def _written(self, writing: Awaitable[None], size: int) -> None:
        within_s = self._write_stall_s * max(1, math.ceil(size / _STALL_BYTES))
        try:
            async with asyncio.timeout(within_s):
                await writing
        except TimeoutError as error:
            raise RequestTimeout(f"the client did not read {size} bytes within {within_s:g} s") from error
        except grpc.aio.BaseError as error:
            raise ClientGone("the client went away") from error


class RequestContext:
    """One request on a call, with its lease."""

    def __init__(self, pipeline: Pipeline, call: CallContext, lease: Lease) -> None:
        self._pipeline = pipeline
        self.call = call
        self.lease = lease

    def named(self, request_id: str) -> None:
        """The message has an id of its own, which goes before what metadata say; empty: it has none."""
        if request_id:
            self.lease.head = replace(self.lease.head, request_id=clean_id(request_id))
            self.call.end_with(self.lease.head)

    async def ask(self, body: bytes) -> bytes:
        """The replica's whole JSON answer. Raises DeepsplitError; EngineRefused for the engine's own errors."""
        async with aclosing(self._items(body)) as items:
            return b"".join([chunk async for chunk in items])

    async def stream(self, body: bytes, announce: bool = True) -> AsyncGenerator[bytes, None]:
        """The data of the answer's events, without the last one, [DONE]. Closing it aborts the generation.

        `announce`: send initial metadata before the first. Raises as `ask` does.
        """
        split = sse.EventSplitter()
        done = False  # the replica's connection is read to its end all the same, and can be used again
        async with aclosing(self._items(body)) as items:
            async for chunk in items:
                if announce:
                    announce = False
                    await self.call.announce(self.lease.head)
                for event in split.feed(chunk):
                    data = sse.data_of(event)
                    done = done or data == sse.DONE
                    if data is not None and not done:
                        yield data

    async def _items(self, body: bytes) -> AsyncGenerator[bytes, None]:
        outlined = await self._pipeline.outline(self.lease, body)
        async with self._pipeline.run(self.lease, outlined, body) as answer:
            limits = tuple(pair for pair in answer.headers.items() if pair[0].startswith("x-ratelimit-"))
            self.call.end_with(self.lease.head, limits)
            if answer.status != 200 or answer.content_type.startswith(sse.CONTENT_TYPE) != outlined.stream:
                whole = b"".join([chunk async for chunk in answer.chunks])
                raise replica_error(answer.status if answer.status != 200 else 500, whole)
            async for chunk in answer.chunks:
                yield chunk


class SessionContext:
    """A call that brings one request after another."""

    def __init__(self, pipeline: Pipeline, call: CallContext, session: Session, path: str) -> None:
        """`path`: what each of its requests asks for."""
        self._pipeline = pipeline
        self.call = call
        self._session = session
        self._path = path

    @asynccontextmanager
    async def request(self, request_id: str, size: int) -> AsyncIterator[RequestContext]:
        """One of its requests, of so many bytes, with a lease of its own."""
        async with self._pipeline.open(self.call.head(self._path, request_id), self._session) as lease:
            lease.hold(size)
            yield RequestContext(self._pipeline, self.call, lease)
