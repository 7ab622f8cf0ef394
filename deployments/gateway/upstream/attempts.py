"""One admitted request on its way: sent to its replica, sent again or continued on another one if that is lost."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from cluster.errors import ReplicaUnavailable, StreamLost
from deployments.admission.waiting_room import WaitingRoom
from deployments.directory.members import ResponseHead
from deployments.gateway.meter import RequestMeter
from deployments.gateway.upstream.continuation import Continuation
from routing.requests.request import Grant, ReplicaLoad, Usage

SSE = "text/event-stream"
# What a replica answers while its engine dies or starts: nothing has been generated, so another one may be asked.
_RETRIED_STATUS = (500, 502, 503)

logger = logging.getLogger(__name__)


class Replicas(Protocol):
    """Where requests are sent; see `deployments.gateway.upstream.pool.ReplicaPool`."""

    def loads(self) -> Sequence[ReplicaLoad]: ...

    def send(
        self, replica_id: str, method: str, path: str, body: bytes, request_id: str
    ) -> AsyncGenerator[ResponseHead | bytes, None]: ...


class Relay:
    """Yields the answer's head and then its chunks. Keeps the gate up to date and finishes the ticket at the end."""

    def __init__(
        self,
        tap: Continuation,
        gate: WaitingRoom,
        replicas: Replicas,
        request_id: str,
        max_resends: int,
        meter: RequestMeter,
        prompt_tokens: int,
    ) -> None:
        """`prompt_tokens`: as estimated."""
        self.tap = tap
        self._prompt_tokens = prompt_tokens
        self._gate = gate
        self._replicas = replicas
        self._request_id = request_id
        self._resends_left = max_resends
        self.replica_id = ""  # where it runs
        self._meter = meter
        self._first_token_told = False

    async def run(self, grant: Grant) -> AsyncGenerator[ResponseHead | bytes, None]:
        """Raises ReplicaUnavailable or a Refusal when nobody else can take it, StreamLost when it cannot go on."""
        self.replica_id = grant.replica_id
        begun = False
        try:
            path, body = self.tap.path, self.tap.upstream_body()
            while True:
                try:
                    async with aclosing(self._attempt(grant, path, body, begun)) as answer:
                        async for item in answer:
                            begun = True
                            yield item
                    return
                except ReplicaUnavailable as error:
                    if begun and (missing := self.tap.closing()) is not None:
                        yield missing
                        return
                    if begun and (why := self.tap.why_not_continuable) is not None:
                        raise StreamLost(
                            f"the attention replica of this stream was lost, and the stream cannot go on exactly "
                            f"elsewhere: {why}; please ask again"
                        ) from error
                    if self._resends_left == 0:
                        raise
                    self._resends_left -= 1
                    self._meter.resent(begun)
                    fields = {"request_id": self._request_id, "continued": begun}
                    logger.warning("a request goes on elsewhere: %s", error, extra={"fields": fields})
                if begun:
                    path, body = await self.tap.continue_request()
                grant = await self._gate.move(grant.ticket)
                self.replica_id = grant.replica_id
        finally:
            self._gate.finish(grant.ticket, self._usage())

    async def _attempt(
        self, grant: Grant, path: str, body: bytes, begun: bool
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        self._meter.sent(grant.replica_id)
        async with aclosing(self._replicas.send(grant.replica_id, "POST", path, body, self._request_id)) as upstream:
            head = await anext(upstream)
            assert isinstance(head, ResponseHead), "a replica's answer begins with its head"
            if not head.content_type.startswith(SSE):
                whole = b"".join([chunk async for chunk in upstream if isinstance(chunk, bytes)])
                elsewhere = any(load.replica_id != grant.replica_id for load in self._replicas.loads())
                if head.status in _RETRIED_STATUS and self._resends_left and elsewhere:
                    raise ReplicaUnavailable(f"replica {grant.replica_id} answered {head.status}")
                if begun:  # a continuation that the engine refuses
                    raise ReplicaUnavailable(f"replica {grant.replica_id} would not continue: {head.status}")
                self.tap.whole(whole)
                yield head
                yield whole
                return
            async for chunk in upstream:
                assert isinstance(chunk, bytes), "a replica's answer has one head"
                passed_on = self.tap.feed(chunk)
                self._report(grant.ticket)
                if passed_on:
                    if not begun:  # the head waits for the first chunk: until then a loss costs the client nothing
                        begun = True
                        yield head
                    yield passed_on
                if self.tap.failed:  # what came before the error counts as sent
                    raise ReplicaUnavailable(f"replica {grant.replica_id}: its engine failed")
            if not self.tap.finished:
                raise ReplicaUnavailable(f"replica {grant.replica_id} ended its stream early")

    def _report(self, ticket: str) -> None:
        if self.tap.saw_token:
            if not self._first_token_told:
                self._first_token_told = True
                self._gate.first_token(ticket)
            self._gate.progress(ticket, self.tap.generated_tokens)
            self._meter.progress(self.tap.generated_tokens)

    def _usage(self) -> Usage:
        complete = self.tap.prompt_tokens is not None
        return Usage(self.tap.prompt_tokens or self._prompt_tokens, self.tap.generated_tokens, complete)
