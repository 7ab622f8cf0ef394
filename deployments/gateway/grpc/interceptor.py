"""The outermost layer of the gRPC server: who may call, bytes to messages, errors to statuses, bounds on slow clients.

Handlers see valid messages only and raise errors of the tree. A handler of a request gets it with its lease, and writes
its answers itself or returns the only one; the others (health, reflection, metadata) are as grpc.aio has them.

What is bounded of requests' memory: what has been received by gateway.max_bodies_mib (`Lease.hold`), and what is being
received by as much again for requests and for sessions each, and by SIDE_READS messages of the largest size for calls
that need no key. What is not bounded: the first 64 KiB or so of each call, which gRPC takes before it is asked for a
message, and the answers that a client does not read, one per call, until its connection is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager

import grpc
from google.protobuf.message import DecodeError, Message

from cluster.config import GatewayConfig
from cluster.errors import ClientGone, DeepsplitError, Overloaded, Plane, Reason, RequestError
from deployments.gateway.arrivals import Arrivals
from deployments.gateway.body import READ_TIMEOUT_S
from deployments.gateway.grpc import inference, oip
from deployments.gateway.grpc.call import CallContext, RequestContext, SessionContext
from deployments.gateway.grpc.errors import BUG, Failure, failure
from deployments.gateway.open_requests import Session, body_arrivals
from deployments.gateway.pipeline import Pipeline

SIDE_CALLS = 256  # health, reflection and metadata calls at once, which need no key
SIDE_STREAMS = 192  # of these, such as may stay: Watch and reflection
SIDE_READS = 32  # of these, such as wait for a message
_LEAST_SIDE_ARRIVAL_S = 0.02
_RETRY_SIDE_CALLS_S = 1.0
Parse = Callable[[bytes], Message]
Behaviour = Callable[..., Awaitable[Message | None] | AsyncGenerator[Message, None]]
Handle = Callable[[CallContext], Awaitable[None]]

logger = logging.getLogger(__name__)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method."""

    def __init__(self, pipeline: Pipeline, config: GatewayConfig, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        """`read_timeout_s`: for the one message of a request."""
        self._pipeline = pipeline
        self._write_stall_s = config.write_stall_s
        self._read_timeout_s = read_timeout_s
        self._arriving = body_arrivals("the request", config)
        self._side_arriving = Arrivals("the request", SIDE_READS, _LEAST_SIDE_ARRIVAL_S, Reason.SIDE_CALLS)
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
        parse = handler.request_deserializer
        handle: Handle
        if method in oip.SESSIONS:
            handle = self._session(behaviour, parse, oip.SESSIONS[method])
        elif path := inference.PATHS.get(method) or oip.PATHS.get(method):
            handle = self._request(behaviour, parse, path)
        else:
            handle = self._side_call(behaviour, parse, handler.request_streaming, handler.response_streaming)

        async def call(_: object, context: grpc.aio.ServicerContext) -> None:
            how = await _outcome(handle, CallContext(context, self._write_stall_s))
            if how is None:
                return
            try:
                await context.abort(how.code, how.message, (*context.trailing_metadata(), *how.metadata))
            except grpc.aio.AbortError:
                raise
            except grpc.aio.BaseError as error:
                raise _gone() from error

        # Whatever the method, messages are read and written here, as those of streams: so every wait can be bounded. On
        # the wire one message looks the same.
        return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)

    def _request(self, behaviour: Behaviour, parse: Parse, path: str) -> Handle:
        async def handle(call: CallContext) -> None:
            async with self._pipeline.open(call.head(path)) as lease:
                raw = await self._arriving.next(lease.tenant.name, call.read, self._read_timeout_s)
                lease.hold(len(raw or b""))
                request = RequestContext(self._pipeline, call, lease)
                await _answer(behaviour(_parsed(raw, parse), request), call)

        return handle

    def _session(self, behaviour: Behaviour, parse: Parse, path: str) -> Handle:
        async def messages(call: CallContext, session: Session) -> AsyncGenerator[Message, None]:
            while (raw := await session.next(call.read)) is not None:
                yield _parsed(raw, parse)

        async def handle(call: CallContext) -> None:
            with self._pipeline.session(call.head(path)) as session:
                async with aclosing(messages(call, session)) as requests:
                    context = SessionContext(self._pipeline, call, session, path)
                    await _answer(behaviour(requests, context), call)

        return handle

    def _side_call(self, behaviour: Behaviour, parse: Parse, stream_in: bool, stream_out: bool) -> Handle:
        async def read(call: CallContext) -> bytes | None:
            return await self._side_arriving.next("", call.read, self._read_timeout_s)

        async def messages(call: CallContext) -> AsyncGenerator[Message, None]:
            while (raw := await read(call)) is not None:
                yield _parsed(raw, parse)

        async def handle(call: CallContext) -> None:
            with self._counted(SIDE_STREAMS if stream_in or stream_out else SIDE_CALLS):
                if stream_in:
                    async with aclosing(messages(call)) as requests:
                        await _answer(behaviour(requests, call.context), call)
                else:
                    await _answer(behaviour(_parsed(await read(call), parse), call.context), call)

        return handle

    @contextmanager
    def _counted(self, most: int) -> Iterator[None]:
        """Calls that nobody counts could take all memory there is; streams leave room for probes."""
        if self._side_calls >= most:
            raise Overloaded(
                f"{self._side_calls} health, reflection and metadata calls are open, this server's limit",
                retry_after_s=_RETRY_SIDE_CALLS_S, plane=Plane.GATEWAY, reason=Reason.SIDE_CALLS,
            )  # fmt: skip
        self._side_calls += 1
        try:
            yield
        finally:
            self._side_calls -= 1


async def _answer(answer: Awaitable[Message | None] | AsyncGenerator[Message, None], call: CallContext) -> None:
    if isinstance(answer, AsyncGenerator):
        async with aclosing(answer) as messages:
            async for message in messages:
                await call.write(message)
    elif (only := await answer) is not None:
        await call.write(only)


def _parsed(raw: bytes | None, parse: Parse) -> Message:
    if raw is None:
        raise RequestError("the call ended without a request message")
    try:
        return parse(raw)
    except DecodeError as error:
        raise RequestError("the request is not a valid message: wrong type, cut short, or text not UTF-8") from error


async def _outcome(handle: Handle, call: CallContext) -> Failure | None:
    """None: it went well. What the call held is gone when this returns, however long the client takes to be told."""
    try:
        await handle(call)
    except ClientGone as error:
        raise _gone() from error
    except DeepsplitError as error:
        return failure(error)
    except grpc.aio.BaseError:  # a servicer's own abort
        raise
    except Exception:
        logger.exception("gRPC call failed")
        return BUG
    return None


def _gone() -> asyncio.CancelledError:
    """Nobody is left to tell, or a message is in the way that the client does not read: gRPC forgets the call."""
    return asyncio.CancelledError("the client went away")
