"""What is open at one gateway: requests, and calls that bring one request after another; their bounds; draining."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from cluster.errors import Draining, Overloaded, Plane, Reason, RequestTimeout
from deployments.gateway.lease import Lease
from routing.requests.request import Tenant

RETRY_DRAINING_S = 2.0
_RETRY_FULL_S = 1.0
_JITTER = 0.5  # those refused together are told different times, up to this share longer
_DRAIN_POLL_S = 0.05
T = TypeVar("T")


class Session:
    """A call that brings one request after another, and may be quiet in between."""

    def __init__(self, tenant: Tenant, idle_timeout_s: float) -> None:
        self.tenant = tenant
        self._idle_timeout_s = idle_timeout_s
        self._quiet: asyncio.Timeout | None = None
        self._evicted = False

    async def next(self, request: Awaitable[T]) -> T:
        """The next request, once it comes. Raises RequestTimeout when the call was quiet for too long, Overloaded when
        its place was needed.
        """
        try:
            async with asyncio.timeout(self._idle_timeout_s) as self._quiet:
                return await request
        except TimeoutError as error:
            if self._evicted:
                raise _full("the gateway needed this call's place: nothing was asked on it") from error
            raise RequestTimeout(
                f"nothing was asked on this call for {self._idle_timeout_s:g} s (gateway.stream_idle_timeout_s)"
            ) from error
        finally:
            self._quiet = None

    def evict(self) -> bool:
        """End the call if it is quiet; whether it was."""
        if self._quiet is None or self._quiet.expired():
            return False
        self._evicted = True
        self._quiet.reschedule(asyncio.get_running_loop().time())
        return True


class OpenRequests:
    """Counts them, bounds them, and ends them when the gateway stops."""

    def __init__(self, most: int, session_idle_s: float) -> None:
        """`most`: requests and sessions together."""
        self._most = most
        self._session_idle_s = session_idle_s
        self._leases: set[Lease] = set()
        self._sessions: dict[Session, None] = {}  # the oldest first
        self._by_tenant: Counter[str] = Counter()  # sessions
        self.draining = False

    def __len__(self) -> int:
        return len(self._leases)

    def check(self) -> None:
        """Raises Draining or Overloaded if nothing more is taken now. Ends a quiet session to make room."""
        if self.draining:
            raise _stopping("this gateway is stopping: send the request again")
        if len(self._leases) + len(self._sessions) < self._most:
            return
        if not any(session.evict() for session in self._sessions):
            raise _full(f"this gateway holds {self._most} requests, its limit (gateway.max_streams)")

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """The request is open."""
        self._leases.add(lease)
        try:
            yield
        finally:
            self._leases.discard(lease)

    @asynccontextmanager
    async def session(self, tenant: Tenant) -> AsyncIterator[Session]:
        """A call that brings one request after another. Raises Draining, or Overloaded: sessions count against their
        tenant's `max_streams`, and one tenant never holds more than half of what the gateway holds.
        """
        self.check()
        most = min(self._most // 2 or 1, tenant.max_streams or self._most)
        if self._by_tenant[tenant.name] >= most:
            raise _full(f"tenant {tenant.name} holds {most} streams at this gateway, its limit (max_streams)")
        session = Session(tenant, self._session_idle_s)
        self._sessions[session] = None
        self._by_tenant[tenant.name] += 1
        try:
            yield session
        finally:
            del self._sessions[session]
            self._by_tenant[tenant.name] -= 1
            if not self._by_tenant[tenant.name]:
                del self._by_tenant[tenant.name]

    async def drain(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end for `grace_s` seconds, then end it with an error."""
        self.draining = True
        await self._until_none(grace_s)
        error = f"the gateway stopped and this request was not done within {grace_s:g} s: send it again"
        for lease in list(self._leases):
            lease.cut(_stopping(error))
        for session in list(self._sessions):
            session.evict()
        await self._until_none(1.0)

    async def _until_none(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while self._leases and loop.time() < until_s:
            await asyncio.sleep(_DRAIN_POLL_S)


def _stopping(message: str) -> Draining:
    return Draining(
        message, retry_after_s=_jittered(RETRY_DRAINING_S), plane=Plane.GATEWAY, reason=Reason.DRAINING
    )


def _full(message: str) -> Overloaded:
    return Overloaded(
        message, retry_after_s=_jittered(_RETRY_FULL_S), plane=Plane.GATEWAY, reason=Reason.MAX_STREAMS
    )


def _jittered(seconds: float) -> float:
    return seconds * (1 + _JITTER * random.random())
