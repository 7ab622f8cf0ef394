"""Admission for several gateways in one place, so that quotas, fairness and order hold for all of them together.

Each gateway keeps one stream to the server. What a gateway holds ends with its stream: a killed gateway leaves nothing
behind. A gateway that cannot reach the server decides by itself over its part of the cluster until it can again.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import msgspec
from grpc import aio

from cluster.addresses import bracketed
from cluster.config import AdmissionConfig, InternalTlsConfig
from cluster.tls.grpc_credentials import expert_server_credentials, peer_is
from deployments.admission.local import LocalAdmission
from deployments.admission.messages import (
    CHANNEL_OPTIONS,
    METHOD,
    SERVICE,
    TOKEN_KEY,
    Cancel,
    Event,
    Finish,
    Restore,
    Spent,
    Submit,
    decode_event,
    encode_decision,
)
from deployments.admission.waiting_room import TICK_S
from deployments.hosting.background import BackgroundTasks
from routing.requests.admission import Admitted, Decision, Demand
from routing.requests.quota import Quotas
from routing.requests.request import ReplicaLoad

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
        self._clock = clock
        self._quotas = Quotas()
        self._admission = LocalAdmission(config, clock, self._decided, self._quotas)
        self._token = token
        self._tls = tls
        self._owners: dict[str, _Connection] = {}  # by ticket
        self._server = aio.server(options=CHANNEL_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._decide)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self._background = BackgroundTasks(logger)

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        target = bracketed(host)
        if self._tls is None:
            port = self._server.add_insecure_port(f"{target}:0")
        else:
            port = self._server.add_secure_port(f"{target}:0", expert_server_credentials(self._tls))
        await self._server.start()
        self._background.start("the tick of the common admission", self._tick())
        return f"{target}:{port}"

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas' newest loads."""
        self._admission.set_loads(loads)

    def demand(self) -> Demand:
        """What the clients of all connected gateways ask for now."""
        return self._admission.demand()

    def check(self) -> None:
        """Raises RuntimeError if nobody's waiting is watched any more."""
        self._background.check()

    async def stop(self) -> None:
        """Break all streams; the gateways then decide by themselves."""
        await self._background.cancel()
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
            for ticket in list(gateway.tickets):
                self._forget(ticket)
                self._admission.tell(Cancel(ticket))

    async def _read(self, messages: AsyncIterator[bytes], gateway: _Connection) -> None:
        async for message in messages:
            try:
                event = decode_event(message)
            except msgspec.DecodeError as error:
                logger.error("a gateway sent a broken message and is cut off: %s", error)
                return
            self._take(event, gateway)

    def _take(self, event: Event | Spent, gateway: _Connection) -> None:
        if isinstance(event, Spent):
            self._quotas.add(event.spending, self._clock())
            return
        if isinstance(event, Submit | Restore):
            ticket = event.ask.ticket
            if self._forget(ticket) is not None:  # its former stream is broken, which we do not know yet
                self._admission.tell(Cancel(ticket))
            gateway.tickets.add(ticket)
            self._owners[ticket] = gateway
            if isinstance(event, Restore):
                self._quotas.restore(event.ask, self._clock())
        elif event.ticket not in gateway.tickets:
            return  # refused meanwhile
        elif isinstance(event, Cancel | Finish):
            self._forget(event.ticket)
        self._admission.tell(event)

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
