"""A lease is one request's stay at the gateway, and the one owner of its end.

Whatever happens, a request's decode slots, quota, memory, metrics, log line and what predictions learn from it are
settled in `Lease.end`, once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.errors import ClientGone, DeepsplitError, Overloaded, Plane, Reason, RequestTimeout
from deployments.admission.waiting_room import WaitingRoom
from deployments.gateway.head import Head
from deployments.gateway.meter import NOBODY, RequestMeter, State
from routing.requests.prediction.prompt_size import PromptSize
from routing.requests.request import Ask, Grant, Usage

_RETRY_BODIES_S = 1.0


class BodyMemory:
    """Counts and bounds the bytes of request bodies that one gateway holds, all requests together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def hold(self, size: int) -> None:
        """Counts further bytes. Raises Overloaded when the bodies would be more than the limit together."""
        if self.held_bytes + size > self._limit_bytes:
            raise Overloaded(
                f"the requests at this gateway hold {self._limit_bytes // 2**20} MiB of bodies, its limit "
                "(gateway.max_bodies_mib)",
                retry_after_s=_RETRY_BODIES_S, plane=Plane.GATEWAY, reason=Reason.BODIES,
            )  # fmt: skip
        self.held_bytes += size

    def release(self, size: int) -> None:
        """Counts so many bytes as gone."""
        self.held_bytes -= size


class Lease:
    """Says all that is known of one request. Belongs to the task that opened it."""

    def __init__(
        self, head: Head, room: WaitingRoom, memory: BodyMemory, prompt_size: PromptSize, meter: RequestMeter
    ) -> None:
        self.head = head
        self.tenant = NOBODY
        self.state = State.ARRIVED
        self.ask: Ask | None = None  # what it asked admission for
        self.predicted_ttft_s: float | None = None
        self.replica_id = ""  # where it runs
        self.sent_to: list[str] = []  # the replicas that got it
        self.resends = 0
        self.arrived_s = meter.clock()
        self.first_s: float | None = None  # when its first tokens came
        self.first_tokens = 0  # how many those were
        self.last_s = 0.0  # when its last tokens so far came
        self.status = 0  # of the answer; 0: none yet
        self.prompt_tokens: int | None = None  # as the engine counts them; None: not known yet
        self.generated_tokens = 0
        self.complete = False  # the answer came to its own end
        self._room = room
        self._memory = memory
        self._prompt_size = prompt_size
        self._meter = meter
        self._body_bytes = 0
        self._text_bytes = 0  # of a prompt given as text
        self._timeout: asyncio.Timeout | None = None
        self._cut_by: DeepsplitError | None = None

    @asynccontextmanager
    async def bounded(self, seconds: float) -> AsyncIterator[None]:
        """Bounds the request's whole life. Raises RequestTimeout when it is over, or what `cut` was given."""
        try:
            async with asyncio.timeout(seconds) as self._timeout:
                yield
        except TimeoutError as error:
            late = RequestTimeout(f"the request took longer than {seconds:g} s and was aborted")
            raise self._cut_by or late from error
        finally:
            self._timeout = None

    def shorten(self, seconds: float) -> None:
        """Lets the request live for at most so long from now."""
        at_s = asyncio.get_running_loop().time() + seconds
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(min(at_s, self._timeout.when() or at_s))

    def cut(self, error: DeepsplitError) -> None:
        """Ends the request now. One that is ending already ends as it would have."""
        if self._timeout is not None and not self._timeout.expired():
            self._cut_by = error
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def hold(self, size: int) -> None:
        """Holds so many further bytes of its body until it ends. Raises Overloaded."""
        self._memory.hold(size)
        self._body_bytes += size

    def estimate(self, text_bytes: int, token_ids: int, is_cut: bool) -> int:
        """Returns the tokens of its prompt, as far as they can be known before the engine has counted them. `is_cut`:
        the engine will cut it, so what it counts says nothing about the text's size.
        """
        self._text_bytes = 0 if token_ids or is_cut else text_bytes
        return self._prompt_size.estimate(text_bytes, token_ids)

    async def admit(self, ask: Ask) -> Grant:
        """Waits for leave to run. Raises Refusal."""
        self.ask, self.state = ask, State.WAITING
        self._meter.waits(self)
        grant = await self._room.admit(ask)
        self._meter.admitted(self, grant)
        self.state, self.replica_id, self.predicted_ttft_s = State.RUNNING, grant.replica_id, grant.predicted_ttft_s
        return grant

    async def move(self) -> None:
        """Waits for leave to run at another replica, when its own was lost. Raises Refusal."""
        assert self.ask is not None, "it was admitted"
        self.replica_id = (await self._room.move(self.ask.ticket)).replica_id

    def resent(self, continued: bool) -> None:
        """Counts that it goes to another replica: from the start, or on from what the client has."""
        self.resends += 1
        self._meter.resent(continued)

    def progress(self, prompt_tokens: int | None, generated_tokens: int) -> None:
        """Notes the tokens so far, as the engine counts them; more than none have been generated."""
        assert self.ask is not None, "it was admitted"
        now_s = self._meter.clock()
        self.prompt_tokens, self.generated_tokens = prompt_tokens, max(1, generated_tokens)
        if self.first_s is None:
            self.first_s, self.first_tokens = now_s, self.generated_tokens
            self._meter.first_token(self, now_s - self.arrived_s)
        else:
            self._meter.further_tokens(self, now_s - self.last_s)
        self.last_s = now_s
        self._room.progress(self.ask.ticket, self.generated_tokens)

    def counted(self, prompt_tokens: int | None, generated_tokens: int) -> None:
        """Notes what the engine says that the request cost, now that its answer is whole."""
        self.prompt_tokens, self.generated_tokens, self.complete = prompt_tokens, generated_tokens, True

    def end(self, error: BaseException | None) -> None:
        """Settles everything that was taken for the request, which is over: well, or by `error`."""
        assert self.state is not State.ENDED, "a request ends once"
        if isinstance(error, ClientGone | asyncio.CancelledError | GeneratorExit) and self.complete:
            error = None  # a client that had it all and went
        self._memory.release(self._body_bytes)
        if self.ask is not None:
            prompt_tokens = self.ask.prompt_tokens if self.prompt_tokens is None else self.prompt_tokens
            if self.status >= 400 and not self.generated_tokens:  # the engine refused it and computed nothing
                prompt_tokens = 0
            complete = self.complete and error is None
            self._room.finish(self.ask.ticket, Usage(prompt_tokens, self.generated_tokens, complete))
        if self.prompt_tokens is not None and self._text_bytes:
            self._prompt_size.learn(self._text_bytes, self.prompt_tokens)
        self._meter.end(self, error)
        self.state = State.ENDED


def new_ticket() -> str:
    """Returns a ticket for `Ask`: unique among all gateways."""
    return uuid.uuid4().hex
