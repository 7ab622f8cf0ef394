"""A gRPC server on a real socket over a door that runs in this process and answers by script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import grpc
import pytest

from cluster.config import GatewayConfig, ServerTls
from cluster.errors import DeepsplitError, Unauthenticated
from deployments.gateway.door import Answer, Call
from deployments.gateway.grpc.server import GrpcServer

MODEL = "tiny"


class ScriptedChunks(AsyncGenerator[bytes, None]):
    """Held by the door, as a replica would hold it: only aclose() ends it, no garbage collection."""

    def __init__(self, door: ScriptedDoor) -> None:
        self._door = door
        self._left = iter(door.chunks)

    async def asend(self, value: None) -> bytes:
        self._door.entered.set()
        for chunk in self._left:
            self._door.sent += 1
            return chunk
        if self._door.hold:
            await asyncio.Event().wait()
        if self._door.error is not None:
            raise self._door.error
        raise StopAsyncIteration

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> bytes:
        raise typ

    async def aclose(self) -> None:
        self._door.closed.set()


@dataclass
class ScriptedDoor:
    """Notes its calls and gives one answer to all of them."""

    chunks: Sequence[bytes] = ()
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    error: DeepsplitError | None = None  # raised at the door, or after the chunks if there are any
    hold: bool = False  # after the chunks, as a replica that is still generating
    is_ready: bool = True
    calls: list[Call] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0
    strangers: bool = False  # nobody has a key
    arrived: list[tuple[str, str | None]] = field(default_factory=list)
    answers: list[ScriptedChunks] = field(default_factory=list)

    @contextmanager
    def arriving(self, path: str, key: str | None, request_id: str) -> Iterator[None]:
        self.arrived.append((path, key))
        if self.strangers:
            raise Unauthenticated("no key")
        yield

    async def answer(self, call: Call) -> Answer:
        self.calls.append(call)
        if self.error is not None and not self.chunks:
            raise self.error
        self.answers.append(ScriptedChunks(self))
        return Answer(self.status, self.content_type, self.headers, self.answers[-1])

    def ready(self) -> Mapping[str, bool]:
        return {MODEL: self.is_ready}

    @property
    def body(self) -> dict[str, object]:
        """JSON body of the last call."""
        body: dict[str, object] = json.loads(self.calls[-1].body)
        return body


def answering(answer: object, status: int = 200, **headers: str) -> ScriptedDoor:
    """A door to one whole JSON answer, in two chunks."""
    data = json.dumps(answer).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return ScriptedDoor([data[:7], data[7:]], status, headers=names)


def streaming(*events: object, hold: bool = False, error: DeepsplitError | None = None) -> ScriptedDoor:
    """A door to a stream of events."""
    done = [] if hold or error else [b"data: [DONE]\n\n"]
    chunks = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return ScriptedDoor([*chunks, *done], content_type="text/event-stream; charset=utf-8", hold=hold, error=error)


def token(text: str, finish: str | None = None) -> dict[str, object]:
    """One event, or a whole answer, of a completion."""
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return {"id": "r1", "created": 17, "model": MODEL, "choices": [choice]}


def gateway_config(tls: ServerTls | None = None, grpc_port: int = 0, **settings: int) -> GatewayConfig:
    """Port 0 takes a free one; the configuration file does not allow it."""
    return GatewayConfig(tls=tls, **settings).model_copy(update={"grpc_port": grpc_port})  # type: ignore[arg-type]


@asynccontextmanager
async def served(
    door: ScriptedDoor,
    config: GatewayConfig | None = None,
    read_timeout_s: float = 10.0,
    write_stall_s: float = 10.0,
    ca_file: Path | None = None,
    options: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[grpc.aio.Channel]:
    """A client's channel, with these `options`, to a server over the door."""
    server = GrpcServer(config or gateway_config(), MODEL, door, read_timeout_s, write_stall_s)
    port = await server.start()
    if ca_file is None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
    else:
        credentials = grpc.ssl_channel_credentials(ca_file.read_bytes())
        channel = grpc.aio.secure_channel(f"localhost:{port}", credentials, options)
    try:
        async with channel:
            yield channel
    finally:
        await server.stop(0)


# --- clients ---


def run(test: Coroutine[object, object, None]) -> None:
    """Every wait in a test ends."""
    asyncio.run(asyncio.wait_for(test, 60))


def status_of(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details()


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata())


async def refused(call: grpc.aio.Call) -> grpc.aio.AioRpcError:
    """How the call ended; it must end with an error."""
    one_answer = isinstance(call, (grpc.aio.UnaryUnaryCall, grpc.aio.StreamUnaryCall))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call if one_answer else read_all(call))
    return raised.value


async def read_all(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
