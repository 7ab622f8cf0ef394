"""A gRPC server on a real socket, over the real pipeline and attention replicas that answer by script."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry

from cluster.config import AdmissionConfig, GatewayConfig, ServerTls
from cluster.keys.api_keys import key_hash
from deployments.admission.local import LocalAdmission
from deployments.admission.waiting_room import WaitingRoom
from deployments.directory.members import ResponseHead
from deployments.gateway.grpc.server import GrpcServer
from deployments.gateway.meter import RequestMeter
from deployments.gateway.models import ModelPages
from deployments.gateway.pipeline import Pipeline
from monitoring.metrics import GatewayMetrics
from routing.requests.quota import Quotas
from routing.requests.request import ReplicaLoad
from routing.requests.tenants import TenantsFile

MODEL = "tiny"
CONTEXT = 4096


@dataclass(frozen=True)
class Asked:
    """A request as an attention replica got it."""

    path: str
    body: dict[str, object]
    headers: Mapping[str, str]


@dataclass
class Replicas:
    """In place of `upstream.pool.ReplicaPool`: notes what it is asked and gives one answer to all of it."""

    chunks: Sequence[bytes] = ()
    status: int = 200
    content_type: str = "application/json"
    error: Exception | None = None  # raised after the chunks, at once if there are none
    hold: bool = False  # after the chunks, as a replica that is still generating, until `released`
    last: bytes = b""  # chunk after that
    names: str = "a"  # none: not ready
    slots: int = 4096
    asked: list[Asked] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    open: int = 0
    sent: int = 0

    def loads(self) -> list[ReplicaLoad]:
        return [ReplicaLoad(name, self.slots, 2**30, max_model_len=CONTEXT) for name in self.names]

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        assert method == "POST"
        self.asked.append(Asked(path, json.loads(body), headers))
        self.open += 1
        try:
            if self.error is not None and not self.chunks:
                raise self.error
            yield ResponseHead(self.status, self.content_type)
            for chunk in self.chunks:
                self.sent += 1
                yield chunk
            self.entered.set()
            if self.hold:
                await self.released.wait()
                yield self.last
            if self.error is not None:
                raise self.error
        finally:
            self.open -= 1
            self.closed.set()

    @property
    def body(self) -> dict[str, object]:
        """JSON body of the last request."""
        return self.asked[-1].body


class Words:
    """A tokenizer of words, and of characters as ids."""

    async def count(self, text: bytes, enough: int) -> int:
        return len(text.split())

    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


class World:
    """A pipeline over replicas."""

    def __init__(self, replicas: Replicas, config: GatewayConfig, keys: Path | None = None) -> None:
        self.replicas = replicas
        self.config = config
        self.room = WaitingRoom(time.monotonic)
        self.room.decide_by(LocalAdmission(AdmissionConfig(), time.monotonic, self.room.decided, Quotas()))
        self.room.set_loads(replicas.loads())
        self.registry = CollectorRegistry()
        meter = RequestMeter(GatewayMetrics(self.registry), AdmissionConfig(), time.monotonic, MODEL)
        tenants = TenantsFile(keys)
        self.pipeline = Pipeline((MODEL, "alias"), config, tenants, self.room, replicas, Words(), meter)
        self.models = ModelPages((MODEL, "alias"), 17, replicas.loads)

    def server(self, read_timeout_s: float = 10.0) -> GrpcServer:
        return GrpcServer(self.config, self.pipeline, self.models, read_timeout_s)

    def requests(self, outcome: str) -> float:
        """How many generating requests ended so."""
        samples = [one for family in self.registry.collect() for one in family.samples]
        return sum(
            one.value for one in samples
            if one.name == "deepsplit_requests_total" and one.labels["outcome"] == outcome
        )  # fmt: skip

    @property
    def idle(self) -> bool:
        """Nothing is left of any request."""
        return (self.room.open_tickets(), len(self.pipeline.open_requests), self.replicas.open) == (0, 0, 0)

    async def until_idle(self) -> None:
        async with asyncio.timeout(10):
            while not self.idle:
                await asyncio.sleep(0.01)


def answering(answer: object, status: int = 200) -> Replicas:
    """Replicas with one whole JSON answer, in two chunks."""
    data = json.dumps(answer).encode()
    return Replicas([data[:7], data[7:]], status)


def streaming(*events: object, hold: bool = False, error: Exception | None = None) -> Replicas:
    """Replicas with a stream of events."""
    done = [] if hold or error else [b"data: [DONE]\n\n"]
    chunks = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return Replicas([*chunks, *done], content_type="text/event-stream; charset=utf-8", hold=hold, error=error)


def token(text: str, finish: str | None = None) -> dict[str, object]:
    """One event, or a whole answer, of a completion."""
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": [ord(c) for c in text]}
    return {"id": "r1", "created": 17, "model": MODEL, "choices": [choice]}


def gateway_config(grpc_port: int = 0, **settings: object) -> GatewayConfig:
    """Port 0 takes a free one; the configuration file does not allow it."""
    return GatewayConfig.model_validate(settings).model_copy(update={"grpc_port": grpc_port})


def tls_config(tls: ServerTls) -> GatewayConfig:
    return gateway_config().model_copy(update={"tls": tls})


def keys_file(folder: Path, **tenants: str) -> Path:
    """Tenants by their names, each with the key `ds-NAME` and these further lines of YAML."""
    path = folder / "keys.yaml"
    lines = [
        f"  - name: {name}\n    keys: ['{key_hash('ds-' + name)}']\n" + (f"    {more}\n" if more else "")
        for name, more in tenants.items()
    ]
    path.write_text("tenants:\n" + "".join(lines))
    path.chmod(0o600)
    return path


def key(name: str) -> tuple[tuple[str, str], ...]:
    """Metadata of that tenant."""
    return (("authorization", f"Bearer ds-{name}"),)


@asynccontextmanager
async def served(
    world: World | Replicas,
    read_timeout_s: float = 10.0,
    ca_file: Path | None = None,
    options: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[grpc.aio.Channel]:
    """A client's channel, with these `options`, to a server."""
    if isinstance(world, Replicas):
        world = World(world, gateway_config())
    server = world.server(read_timeout_s)
    port = await server.start()
    try:
        async with client(port, ca_file, options) as channel:
            yield channel
    finally:
        await server.stop(0)
        assert world.idle, "something is left of a request"


def client(port: int, ca_file: Path | None = None, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
    """A channel of its own connection."""
    options = (("grpc.use_local_subchannel_pool", 1), *options)
    if ca_file is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
    return grpc.aio.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(ca_file.read_bytes()), options)


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
