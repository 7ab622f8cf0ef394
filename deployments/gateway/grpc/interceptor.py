"""The outermost layer of the gRPC server: bytes to messages, errors to statuses, and bounds on slow clients.

Handlers see valid messages only, raise errors of the tree, and are closed at once when their call ends, however it
does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.errors import DeepsplitError, RequestError, RequestTimeout
from deployments.gateway.grpc.bounds import Entrance
from deployments.gateway.grpc.errors import BUG, Failure, ReplicaRefused, failure

logger = logging.getLogger(__name__)


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every method."""

    def __init__(self, entrance: Entrance, read_timeout_s: float, write_stall_s: float) -> None:
        """`read_timeout_s`: for the one message of a unary request; `write_stall_s`: until a client that reads nothing
        is given up.
        """
        self._entrance = entrance
        self._read_timeout_s = read_timeout_s
        self._write_stall_s = write_stall_s
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.aio.ServerInterceptor."""
        method = details.method
        if method not in self._wrapped:
            handler = await continuation(details)
            if handler is None:
                return None
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        parse = handler.request_deserializer

        async def request(context: grpc.aio.ServicerContext) -> Message | AsyncGenerator[Message, None]:
            with self._entrance.message(method, context):
                return _requests(context, parse) if handler.request_streaming else await self._request(context, parse)

        async def one(_: object, context: grpc.aio.ServicerContext) -> Message:
            async with _failing_well(context):
                with self._entrance.call(method):
                    answer: Message = await behaviour(await request(context), context)
                    return answer

        async def many(_: object, context: grpc.aio.ServicerContext) -> None:
            async with _failing_well(context):
                with self._entrance.call(method):
                    async with aclosing(behaviour(await request(context), context)) as messages:
                        async for message in messages:
                            await self._write(context, message)

        # A unary request is read as a stream of one, the same bytes on the wire: so the wait for it can be bounded.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(one, None, handler.response_serializer)

    async def _request(self, context: grpc.aio.ServicerContext, parse: Callable[[bytes], Message]) -> Message:
        try:
            async with asyncio.timeout(self._read_timeout_s):
                raw = await context.read()
        except TimeoutError as error:
            raise RequestTimeout(f"the request did not arrive within {self._read_timeout_s:g} s") from error
        if raw is grpc.aio.EOF:
            raise RequestError("the call ended without a request message")
        return _parsed(raw, parse)

    async def _write(self, context: grpc.aio.ServicerContext, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_stall_s):
                await context.write(message)
        except TimeoutError as error:
            raise RequestTimeout(f"the client read nothing for {self._write_stall_s:g} s") from error


async def _requests(
    context: grpc.aio.ServicerContext, parse: Callable[[bytes], Message]
) -> AsyncGenerator[Message, None]:
    while (raw := await context.read()) is not grpc.aio.EOF:
        yield _parsed(raw, parse)


def _parsed(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(raw)
    except DecodeError as error:
        raise RequestError("the request is not a valid message: wrong type, cut short, or text not UTF-8") from error


@asynccontextmanager
async def _failing_well(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except (DeepsplitError, ReplicaRefused) as error:
        await _abort(context, failure(error))
    except grpc.aio.BaseError:  # an abort, or the connection is gone
        raise
    except Exception:
        logger.exception("gRPC call failed")
        await _abort(context, BUG)


async def _abort(context: grpc.aio.ServicerContext, how: Failure) -> None:
    await context.abort(how.code, how.message, (*context.trailing_metadata(), *how.metadata))
