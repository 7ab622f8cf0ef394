"""One admitted request at attention replicas: sent, and sent again or continued elsewhere when its replica is lost.

The only retry loop of the gateway. A request that was at two replicas when they were lost is not sent to a third,
unless the last of them had got on with it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from cluster.errors import EngineKilled, ReplicaLost, ReplicaUnavailable, StreamLost
from deployments.directory.members import ResponseHead
from deployments.gateway.lease import Lease
from deployments.gateway.outline import Outline
from deployments.gateway.paths import CHAT, COMPLETIONS, RESPONSES
from deployments.gateway.upstream import sse
from deployments.gateway.upstream.continuation import Continuation, Decode
from deployments.gateway.upstream.engine_messages import in_our_words
from deployments.gateway.upstream.pool import ReplicaPool, longest_context

_JSON = "application/json"
# What a replica answers while its engine dies or starts: nothing has been generated, so another one may be asked.
_RETRIED_STATUS = (500, 502, 503)
_MOST_LOSSES = 2  # replicas that were lost with the request on them, the last one before it gave a token

logger = logging.getLogger(__name__)


class Attempts:
    """Yields the answer's chunks, and tells the lease how far the answer is. `head` is there with the first chunk."""

    head: ResponseHead

    def __init__(
        self, lease: Lease, outlined: Outline, body: bytes, pool: ReplicaPool, decode: Decode, max_resends: int
    ) -> None:
        self._lease = lease
        self._outline = outlined
        self._body = body
        self._pool = pool
        self._decode = decode
        self._resends_left = max_resends
        self._losses = 0
        self._path = lease.head.path
        self._events = self._fresh()
        self._begun = False  # the client has something
        self._had_tokens = 0  # when the replica that has the request got it

    async def run(self) -> AsyncGenerator[bytes, None]:
        """Raises ReplicaUnavailable or a Refusal when nobody else can take the request, EngineKilled when nobody else
        may, StreamLost when its stream cannot go on.
        """
        path, body = self._path, self._events.upstream_body()
        while True:
            try:
                async with aclosing(self._attempt(path, body)) as chunks:
                    async for chunk in chunks:
                        self._begun = True
                        yield chunk
                return
            except ReplicaUnavailable as error:
                if self._begun and (missing := self._events.closing()) is not None:
                    self._report()
                    yield missing
                    return
                self._may_go_on(error)
            if self._begun:
                path, body = await self._events.continue_request(longest_context(self._pool.loads()))
            else:
                self._events = self._fresh()  # what the lost attempt showed is forgotten
            await self._lease.move()

    def _may_go_on(self, error: ReplicaUnavailable) -> None:
        """Raises what ends the request, if it must not or cannot go to another replica."""
        if isinstance(error, ReplicaLost):
            self._losses += 1
            # One may be bad luck, and who got on with the request in between was not killed by it.
            if self._losses >= _MOST_LOSSES and self._events.generated_tokens == self._had_tokens:
                about = {"request_id": self._lease.head.request_id}
                logger.error("two replicas were lost with this request; it is refused", extra={"fields": about})
                raise EngineKilled(
                    f"two attention replicas failed or were lost while they computed this request ({error}); it is "
                    "not sent to a third: the request itself may be what kills them"
                ) from error
        if self._begun and (why := self._events.why_not_continuable) is not None:
            raise StreamLost(
                f"the attention replica of this stream was lost, and the stream cannot go on exactly elsewhere: {why}; "
                "please ask again"
            ) from error
        if self._resends_left == 0:
            raise error
        self._resends_left -= 1
        self._lease.resent(self._begun)
        fields = {"request_id": self._lease.head.request_id, "continued": self._begun}
        logger.warning("a request goes on elsewhere: %s", error, extra={"fields": fields})

    async def _attempt(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        replica_id = self._lease.replica_id
        self._had_tokens = self._events.generated_tokens
        self._lease.sent_to.append(replica_id)
        upstream = self._pool.send(replica_id, self._lease.head.method, path, body, self._lease.head.passed_on())
        async with aclosing(upstream):
            head = await anext(upstream)
            assert isinstance(head, ResponseHead), "a replica's answer begins with its head"
            if not head.content_type.startswith(sse.CONTENT_TYPE):
                whole = b"".join([chunk async for chunk in upstream if isinstance(chunk, bytes)])
                yield self._whole(head, whole)
                return
            held = b""  # until the first token: a loss costs the client nothing before, and a refusal is told as one
            lost: ReplicaLost | None = None
            try:
                async for chunk in upstream:
                    assert isinstance(chunk, bytes), "a replica's answer has one head"
                    held += self._events.feed(chunk)
                    self._report()
                    if held and (self._begun or self._events.saw_token or self._events.finished):
                        if not self._begun:
                            self.head = head
                        yield held
                        held = b""
                    if self._events.error is not None:
                        break
            except ReplicaLost as error:
                lost = error
        if not self._events.finished or self._events.error is not None:
            yield await self._failed(path, lost or ReplicaLost(f"replica {replica_id} ended its stream early"))

    def _whole(self, head: ResponseHead, body: bytes) -> bytes:
        """An answer that is no stream. Raises ReplicaUnavailable if another replica should be asked."""
        replica_id = self._lease.replica_id
        if self._begun:  # a continuation that the engine refuses
            raise ReplicaUnavailable(f"replica {replica_id} would not continue: {head.status}")
        if head.status in _RETRIED_STATUS and self._may_ask_another():
            kind = ReplicaLost if head.status == 500 else ReplicaUnavailable  # only with 500 had it begun
            raise kind(f"replica {replica_id} answered {head.status}")
        self.head = head
        if head.status >= 400:
            return in_our_words(body)
        self._events.whole(body)
        self._lease.counted(self._events.prompt_tokens, self._events.generated_tokens)
        return body

    async def _failed(self, path: str, lost: ReplicaLost) -> bytes:
        """What follows in a stream that broke off (`lost`), or that the engine ended with an error. Before its first
        token the answer is the one to the same request without a stream: same status, same text. Raises
        ReplicaUnavailable if the replica, and not the request, is at fault.
        """
        error = self._events.error
        if self._begun:
            if error is None or error.status >= 500:
                raise lost
            self._lease.status = error.status
            name = b"" if path in (COMPLETIONS, CHAT) else b"event: error\n"
            return name + b"data: " + error.body + b"\n\n"
        if path not in (COMPLETIONS, CHAT):
            return self._whole(*await self._unstreamed(path, lost))  # the events of these paths do not say enough
        if error is None:
            raise lost
        return self._whole(ResponseHead(error.status, _JSON), error.body)

    async def _unstreamed(self, path: str, lost: ReplicaLost) -> tuple[ResponseHead, bytes]:
        """How the replica refuses the same request without a stream, of one token at most. Raises `lost` if it does
        not.
        """
        bound = "max_output_tokens" if path == RESPONSES else "max_tokens"
        body = msgspec.json.encode({**msgspec.json.decode(self._body), "stream": False, bound: 1})
        upstream = self._pool.send(self._lease.replica_id, "POST", path, body, self._lease.head.passed_on())
        try:
            async with aclosing(upstream):
                head = await anext(upstream)
                assert isinstance(head, ResponseHead), "a replica's answer begins with its head"
                answer = b"".join([chunk async for chunk in upstream if isinstance(chunk, bytes)])
        except ReplicaUnavailable:
            raise lost from None
        if head.status < 400:
            raise lost
        return head, answer

    def _may_ask_another(self) -> bool:
        others = any(load.replica_id != self._lease.replica_id for load in self._pool.loads())
        return self._losses > 0 or (others and self._resends_left > 0)

    def _report(self) -> None:
        events = self._events
        if events.saw_token:
            self._lease.progress(events.prompt_tokens, events.generated_tokens)
        if events.finished:
            self._lease.counted(events.prompt_tokens, events.generated_tokens)

    def _fresh(self) -> Continuation:
        return Continuation(self._path, self._outline, self._body, self._decode)
