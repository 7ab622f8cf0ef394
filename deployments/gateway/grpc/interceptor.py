"""The outermost layer of the gRPC server: who may call, bytes to messages, errors to statuses, bounds on slow clients.

Handlers see valid messages only and raise errors of the tree. A handler of a request gets it with its lease, and writes
its answers itself; the others (health, reflection, metadata) are as grpc.aio has them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.errors import DeepsplitError, Overloaded, Plane, Reason, RequestError, RequestTimeout
from deployments.gateway.body import READ_TIMEOUT_S
from deployments.gateway.grpc.call import CallContext, RequestContext, SessionContext
from deployments.gateway.grpc.errors import BUG, Failure, failure
from deployments.gateway.head import api_key
from deployments.gateway.open_requests import Session
from deployments.gateway.pipeline import Pipeline

SIDE_CALLS = 256  # health, reflection and metadata calls at once, which need no key
_RETRY_SIDE_CALLS_S = 1.0
Parse = Callable[[bytes], Message]

logger = logging.getLogger(__name__)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method."""

    def __init__(
        self,
        pipeline: Pipeline,
        paths: Mapping[str, str],
        sessions: Mapping[str, str],
        write_stall_s: float,
        read_timeout_s: float = READ_TIMEOUT_S,
        side_calls: int = SIDE_CALLS,
    ) -> None:
        """`paths`: method -> path that its request asks for; `sessions`: the same for methods that bring one request
        after another; all others need no key. `read_timeout_s`: for the one message of a request.
        """
        self._pipeline = pipeline
        self._paths = paths
        self._sessions = sessions
        self._write_stall_s = write_stall_s
        self._read_timeout_s = read_timeout_s
        self._most_side_calls = side_calls
        self._side_calls = 0
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
        parse, streams = handler.request_deserializer, handler.response_streaming

        async def request(_: object, context: grpc.aio.ServicerContext) -> Message | None:
            call = CallContext(context, self._write_stall_s)
            async with _failing_well(context), self._pipeline.open(call.head(self._paths[method])) as lease:
                raw = await self._read(context)
                lease.hold(len(raw))
                answer: Message | None = await behaviour(
                    _parsed(raw, parse), RequestContext(self._pipeline, call, lease)
                )
                return answer

        async def session(_: object, context: grpc.aio.ServicerContext) -> None:
            call = CallContext(context, self._write_stall_s)
            async with (
                _failing_well(context),
                self._pipeline.session(api_key(call.metadata)) as opened,
                aclosing(_messages(context, parse, opened)) as messages,
            ):
                await behaviour(messages, SessionContext(self._pipeline, call, opened, self._sessions[method]))

        async def side_call(_: object, context: grpc.aio.ServicerContext) -> Message | None:
            async with _failing_well(context):
                with self._side_call():
                    message = _parsed(await self._read(context), parse)
                    return await self._answer(behaviour, message, context, streams)

        async def side_stream(_: object, context: grpc.aio.ServicerContext) -> None:
            async with _failing_well(context):
                with self._side_call():
                    async with aclosing(_messages(context, parse, None)) as messages:
                        await self._answer(behaviour, messages, context, streams)

        wrapped: Callable[[object, grpc.aio.ServicerContext], Awaitable[Message | None]]
        if method in self._sessions:
            wrapped = session
        elif method in self._paths:
            wrapped = request
        else:
            wrapped = side_stream if handler.request_streaming else side_call
        # A unary request is read as a stream of one, the same bytes on the wire: so the wait for it can be bounded.
        if streams:
            return grpc.stream_stream_rpc_method_handler(wrapped, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(wrapped, None, handler.response_serializer)

    async def _answer(
        self,
        behaviour: Callable[..., Awaitable[Message] | AsyncGenerator[Message, None]],
        request: Message | AsyncGenerator[Message, None],
        context: grpc.aio.ServicerContext,
        streams: bool,
    ) -> Message | None:
        """Of a servicer that is as grpc.aio has them."""
        answer = behaviour(request, context)
        if not isinstance(answer, AsyncGenerator):
            return await answer
        assert streams, "one message for a unary method"
        call = CallContext(context, self._write_stall_s)
        async with aclosing(answer) as messages:
            async for message in messages:
                await call.write(message)
        return None

    async def _read(self, context: grpc.aio.ServicerContext) -> bytes:
        try:
            async with asyncio.timeout(self._read_timeout_s):
                raw: bytes = await context.read()
        except TimeoutError as error:
            raise RequestTimeout(f"the request did not arrive within {self._read_timeout_s:g} s") from error
        if raw is grpc.aio.EOF:
            raise RequestError("the call ended without a request message")
        return raw

    @contextmanager
    def _side_call(self) -> Iterator[None]:
        """Watches that nobody counts could take every call there is."""
        if self._side_calls >= self._most_side_calls:
            raise Overloaded(
                f"{self._side_calls} health, reflection and metadata calls are open, this server's limit",
                retry_after_s=_RETRY_SIDE_CALLS_S, plane=Plane.GATEWAY, reason=Reason.SIDE_CALLS,
            )  # fmt: skip
        self._side_calls += 1
        try:
            yield
        finally:
            self._side_calls -= 1


async def _messages(
    context: grpc.aio.ServicerContext, parse: Parse, session: Session | None
) -> AsyncGenerator[Message, None]:
    while True:
        raw = await (context.read() if session is None else session.next(context.read()))
        if raw is grpc.aio.EOF:
            return
        yield _parsed(raw, parse)


def _parsed(raw: bytes, parse: Parse) -> Message:
    try:
        return parse(raw)
    except DecodeError as error:
        raise RequestError("the request is not a valid message: wrong type, cut short, or text not UTF-8") from error


@asynccontextmanager
async def _failing_well(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except DeepsplitError as error:
        await _abort(context, failure(error))
    except grpc.aio.BaseError:  # an abort, or the connection is gone
        raise
    except Exception:
        logger.exception("gRPC call failed")
        await _abort(context, BUG)


async def _abort(context: grpc.aio.ServicerContext, how: Failure) -> None:
    await context.abort(how.code, how.message, (*context.trailing_metadata(), *how.metadata))
