"""A gateway's end of the common admission: a stream to its server, and deciding alone while that is away."""

from __future__ import annotations

import asyncio
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
    Cancel,
    Event,
    Finish,
    Progress,
    Restore,
    Spent,
    Submit,
    decode_decision,
    encode_event,
)
from deployments.admission.waiting_room import Decider, WaitingRoom
from deployments.hosting.background import BackgroundTasks
from routing.requests.admission import Admitted, Decision
from routing.requests.quota import Quotas, reservation
from routing.requests.request import Ask, ReplicaLoad

RECONNECT_S = 0.5
_CONNECT_TIMEOUT_S = 2.0
_LOST = (aio.AioRpcError, TimeoutError, msgspec.DecodeError)

logger = logging.getLogger(__name__)


class RemoteAdmission:
    """A `Decider` on the other end of one stream. Events that a broken stream swallowed are made good by the
    waiting room, which presents all its tickets to whoever decides next.

    It keeps this gateway's own quotas up to date, so that they are true whenever the stream breaks.
    """

    def __init__(self, quotas: Quotas, clock: Callable[[], float], decided: Callable[[Decision], None]) -> None:
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._quotas = quotas
        self._clock = clock
        self._decided = decided
        self._waiting: dict[str, Ask] = {}  # what has not run yet
        self._running: dict[str, tuple[Ask, int]] = {}  # with the tokens generated so far, as told

    async def events(self) -> AsyncIterator[bytes]:
        """What goes out, for the stream."""
        while (message := await self._outbox.get()) is not None:
            yield message

    def report(self, since_told: bool) -> None:
        """Tell what has been used of the quotas; `since_told`: the other end knows what came before the last break."""
        for spending in self._quotas.spending(self._clock(), since_told):
            self._send(Spent(spending))

    def decided(self, decision: Decision) -> None:
        """A decision came."""
        if isinstance(decision, Admitted):
            ask = self._waiting.pop(decision.grant.ticket, None)
            if ask is not None:
                self._quotas.take(ask, self._clock())
                self._running[ask.ticket] = ask, 0
        else:
            self._end(decision.ticket, None)
        self._decided(decision)

    def close(self) -> None:
        """End `events`: grpc leaves the task that reads them waiting when a stream breaks. The other end will charge
        what it knows of each request and drop the rest of its reservation.
        """
        self._outbox.put_nowait(None)
        now_s = self._clock()
        self._quotas.mark_told(now_s)
        for ask, generated_tokens in self._running.values():
            self._quotas.untell(ask, reservation(ask) - ask.prompt_tokens - generated_tokens, now_s)

    def tell(self, event: Event) -> None:
        """The event is passed on, and noted as far as the quotas need it."""
        if isinstance(event, Submit):
            self._waiting[event.ask.ticket] = event.ask
        elif isinstance(event, Restore):
            self._running[event.ask.ticket] = event.ask, event.generated_tokens
        elif isinstance(event, Progress) and event.ticket in self._running:
            self._running[event.ticket] = self._running[event.ticket][0], event.generated_tokens
        elif isinstance(event, Cancel):
            self._end(event.ticket, None)
        elif isinstance(event, Finish):
            self._end(event.ticket, event.usage.prompt_tokens + event.usage.generated_tokens)
        self._send(event)

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """The server hears from the replicas itself."""

    def _end(self, ticket: str, tokens: int | None) -> None:
        """None: as many tokens as are known of."""
        self._waiting.pop(ticket, None)
        if (known := self._running.pop(ticket, None)) is not None:
            ask, generated_tokens = known
            used = ask.prompt_tokens + generated_tokens if tokens is None else tokens
            self._quotas.commit(ask, used, self._clock())

    def _send(self, event: Event | Spent) -> None:
        self._outbox.put_nowait(encode_event(event))


class AdmissionClient:
    """Has a gateway's waiting room decided by the common admission while that can be reached, alone while not."""

    def __init__(
        self,
        room: WaitingRoom,
        alone: Callable[[], Decider],
        quotas: Quotas,
        clock: Callable[[], float],
        tls: InternalTlsConfig | None,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        """`alone` makes the decider for the time without the server; a fresh one each time, but with these `quotas`,
        which know what this gateway's requests have used whoever decides. Raises StartupError.
        """
        self._room = room
        self._alone = alone
        self._quotas = quotas
        self._clock = clock
        self._told_token: str | None = None  # of the server that knows what was used until its stream broke
        self._channels = None if tls is None else ExpertChannels(tls)
        self._reconnect_s = reconnect_s
        self._target: tuple[str, str] | None = None  # address, token
        self._moved = asyncio.Event()
        self.connected = False
        room.decide_by(alone())
        self._background = BackgroundTasks(logger)
        self._background.start("the connection to the common admission", self._stay_connected())

    def set_server(self, address: str, token: str) -> None:
        """Where the common admission listens."""
        if self._target != (address, token):
            self._target = (address, token)
            self._moved.set()

    async def close(self) -> None:
        """Break the stream."""
        await self._background.cancel()

    def check(self) -> None:
        """Raises RuntimeError if it no longer tries to reach the server."""
        self._background.check()

    async def _stay_connected(self) -> None:
        while True:
            if self._target is None:
                await self._moved.wait()
            self._moved.clear()
            assert self._target is not None
            try:
                await self._serve(*self._target)
            except _LOST as error:
                if self.connected:
                    logger.warning("common admission lost (%s); deciding alone", type(error).__name__)
            except Exception:  # a fault of ours: this gateway goes on deciding alone, and the next attempt may succeed
                logger.exception("the connection to the common admission failed; deciding alone")
            finally:
                if self.connected:
                    self.connected = False
                    self._room.decide_by(self._alone())
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
            remote = RemoteAdmission(self._quotas, self._clock, self._room.decided)
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(remote.events(), metadata=((TOKEN_KEY, token),))
            self._room.leave()
            self._quotas.set_fraction(1.0)
            remote.report(since_told=token == self._told_token)
            self.connected, self._told_token = True, token
            self._room.decide_by(remote)
            logger.info("common admission reached at %s", address)
            try:
                async for message in call:
                    remote.decided(decode_decision(message))
                    if self._moved.is_set():
                        return
            finally:
                remote.close()
