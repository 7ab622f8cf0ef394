"""Admission for several gateways in one place, so that quotas, fairness and order hold for all of them together.

Each gateway keeps one stream to the server. What a gateway holds ends with its stream: a killed gateway leaves nothing
behind. A gateway that cannot reach the server decides by itself over its part of the cluster until it can again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import grpc
import msgspec
from grpc import aio

from cluster.config import AdmissionConfig, InternalTlsConfig
from deployments.admission_messages import (
    METHOD,
    SERVICE,
    TOKEN_KEY,
    Adopt,
    Event,
    Finish,
    FirstToken,
    Move,
    Offer,
    Progress,
    Withdraw,
    decode_decision,
    decode_event,
    encode_decision,
    encode_event,
)
from deployments.gate import TICK_S, Decider, Gate, LocalAdmission
from routing.admission import Admitted, Decision
from routing.request import Ask, ReplicaLoad, Usage
from routing.tls import ExpertChannels, expert_server_credentials, peer_is

RECONNECT_S = 0.5
_CONNECT_TIMEOUT_S = 2.0
# A server that is hung or cut off is given up after interval + timeout; meanwhile its clients wait.
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
]

logger = logging.getLogger(__name__)


@dataclass
class _Connection:
    """One gateway's stream. None in its outbox ends it."""

    outbox: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    tickets: set[str] = field(default_factory=set)


class AdmissionServer:
    """The common admission's gRPC server. Runs on one event loop."""

    def __init__(
        self, config: AdmissionConfig, clock: Callable[[], float], token: str, tls: InternalTlsConfig | None
    ) -> None:
        self._admission = LocalAdmission(config, clock, self._decided)
        self._token = token
        self._tls = tls
        self._owners: dict[str, _Connection] = {}  # by ticket
        self._server = aio.server(options=_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._decide)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self._ticking: asyncio.Task[None] | None = None

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        target = f"[{host}]" if ":" in host else host
        if self._tls is None:
            port = self._server.add_insecure_port(f"{target}:0")
        else:
            port = self._server.add_secure_port(f"{target}:0", expert_server_credentials(self._tls))
        await self._server.start()
        self._ticking = asyncio.create_task(self._tick())
        return f"{target}:{port}"

    def fleet(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas' newest loads."""
        self._admission.fleet(loads)

    async def stop(self) -> None:
        """Break all streams; the gateways then decide by themselves."""
        if self._ticking is not None:
            self._ticking.cancel()
        await self._server.stop(0)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._admission.tick()

    async def _decide(self, messages: AsyncIterator[bytes], context: aio.ServicerContext) -> AsyncIterator[bytes]:
        shown = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if not hmac.compare_digest(str(shown).encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not a gateway of this cluster")
        if self._tls is not None and not peer_is(self._tls.server_name, context.auth_context()):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"the caller's certificate is not for {self._tls.server_name} (internal_tls.server_name)",
            )
        gateway = _Connection()
        reading = asyncio.create_task(self._read(messages, gateway))
        reading.add_done_callback(lambda _: gateway.outbox.put_nowait(None))
        try:
            while (message := await gateway.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()
            for ticket in gateway.tickets:
                self._owners.pop(ticket, None)
                self._admission.finish(ticket, None)

    async def _read(self, messages: AsyncIterator[bytes], gateway: _Connection) -> None:
        async for message in messages:
            try:
                event = decode_event(message)
            except msgspec.DecodeError as error:
                logger.error("a gateway sent a broken message and is cut off: %s", error)
                return
            self._take(event, gateway)

    def _take(self, event: Event, gateway: _Connection) -> None:
        admission = self._admission
        if isinstance(event, Offer | Adopt):
            gateway.tickets.add(event.ask.ticket)
            self._owners[event.ask.ticket] = gateway
            if isinstance(event, Offer):
                admission.offer(event.ask)
            else:
                admission.adopt(event.ask, event.replica_id)
            return
        if event.ticket not in gateway.tickets:
            return  # refused meanwhile
        match event:
            case FirstToken():
                admission.first_token(event.ticket)
            case Progress():
                admission.progress(event.ticket, event.generated_tokens)
            case Move():
                admission.move(event.ticket)
            case Withdraw():
                self._forget(event.ticket)
                admission.withdraw(event.ticket)
            case Finish():
                self._forget(event.ticket)
                admission.finish(event.ticket, event.usage)
            case _:
                assert_never(event)

    def _forget(self, ticket: str) -> _Connection | None:
        gateway = self._owners.pop(ticket, None)
        if gateway is not None:
            gateway.tickets.discard(ticket)
        return gateway

    def _decided(self, decision: Decision) -> None:
        if isinstance(decision, Admitted):
            gateway = self._owners.get(decision.grant.ticket)
        else:
            gateway = self._forget(decision.ticket)
        if gateway is not None:
            gateway.outbox.put_nowait(encode_decision(decision))


class RemoteAdmission:
    """A `Decider` on the other end of one stream. Events that a broken stream swallowed are made good by the gate,
    which presents all its tickets to whoever decides next.
    """

    def __init__(self) -> None:
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def events(self) -> AsyncIterator[bytes]:
        """What goes out, for the stream."""
        while (message := await self._outbox.get()) is not None:
            yield message

    def close(self) -> None:
        """End `events`: grpc leaves the task that reads them waiting when a stream breaks."""
        self._outbox.put_nowait(None)

    def offer(self, ask: Ask) -> None:
        self._send(Offer(ask))

    def adopt(self, ask: Ask, replica_id: str) -> None:
        self._send(Adopt(ask, replica_id))

    def withdraw(self, ticket: str) -> None:
        self._send(Withdraw(ticket))

    def first_token(self, ticket: str) -> None:
        self._send(FirstToken(ticket))

    def progress(self, ticket: str, generated_tokens: int) -> None:
        self._send(Progress(ticket, generated_tokens))

    def move(self, ticket: str) -> None:
        self._send(Move(ticket))

    def finish(self, ticket: str, usage: Usage | None) -> None:
        self._send(Finish(ticket, usage))

    def fleet(self, loads: Sequence[ReplicaLoad]) -> None:
        """The server hears from the replicas itself."""

    def _send(self, event: Event) -> None:
        self._outbox.put_nowait(encode_event(event))


class FleetAdmission:
    """Keeps a gateway's gate at the common admission while that can be reached, at one of its own while not."""

    def __init__(
        self, gate: Gate, alone: Callable[[], Decider], tls: InternalTlsConfig | None, reconnect_s: float = RECONNECT_S
    ) -> None:
        """`alone` makes the decider for the time without the server; a fresh one each time. Raises StartupError."""
        self._gate = gate
        self._alone = alone
        self._channels = None if tls is None else ExpertChannels(tls)
        self._reconnect_s = reconnect_s
        self._target: tuple[str, str] | None = None  # address, token
        self._moved = asyncio.Event()
        self.connected = False
        gate.decide_by(alone())
        self._connecting = asyncio.create_task(self._connect())

    def set_server(self, address: str, token: str) -> None:
        """Where the common admission listens."""
        if self._target != (address, token):
            self._target = (address, token)
            self._moved.set()

    async def close(self) -> None:
        """Break the stream."""
        self._connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._connecting

    async def _connect(self) -> None:
        while True:
            if self._target is None:
                await self._moved.wait()
            self._moved.clear()
            assert self._target is not None
            try:
                await self._serve(*self._target)
            except (aio.AioRpcError, TimeoutError, msgspec.DecodeError) as error:
                if self.connected:
                    logger.warning("common admission lost (%s); deciding alone", type(error).__name__)
            finally:
                if self.connected:
                    self.connected = False
                    self._gate.decide_by(self._alone())
            await asyncio.sleep(self._reconnect_s)

    async def _serve(self, address: str, token: str) -> None:
        """Until the stream ends or the server has moved."""
        if self._channels is None:
            channel = aio.insecure_channel(address, options=_OPTIONS)
        else:
            options = [*_OPTIONS, *self._channels.options()]
            channel = aio.secure_channel(address, self._channels.credentials(), options=options)
        async with channel:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await channel.channel_ready()
            remote = RemoteAdmission()
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(remote.events(), metadata=((TOKEN_KEY, token),))
            self.connected = True
            self._gate.decide_by(remote)
            logger.info("common admission reached at %s", address)
            try:
                async for message in call:
                    self._gate.decided(decode_decision(message))
                    if self._moved.is_set():
                        return
            finally:
                remote.close()
