"""A gateway's end of the common admission: a stream to its server, and deciding alone while that is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
from grpc import aio

from cluster.config import InternalTlsConfig
from cluster.tls.grpc_credentials import ExpertChannels
from deployments.admission.messages import (
    CHANNEL_OPTIONS,
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
    encode_event,
)
from deployments.admission.waiting_room import Decider, Gate
from routing.requests.request import Ask, ReplicaLoad, Usage

RECONNECT_S = 0.5
_CONNECT_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


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
            channel = aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            options = [*CHANNEL_OPTIONS, *self._channels.options()]
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
