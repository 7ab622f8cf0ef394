"""What is open at one gateway: requests, and calls that bring one request after another; their bounds; draining."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cluster.config import GatewayConfig
from cluster.errors import Draining, Overloaded, Plane, QuotaExceeded, Reason
from deployments.gateway.arrivals import Arrivals
from deployments.gateway.lease import Lease
from routing.requests.request import Tenant

RETRY_DRAINING_S = 2.0
_LEAST_ARRIVAL_S = 1.0  # how long a message may take to arrive, however many others want its place
_RETRY_FULL_S = 1.0
_JITTER = 0.5  # those refused together are told different times, up to this share longer
_DRAIN_POLL_S = 0.05
T = TypeVar("T")


class Session:
    """A call that brings one request after another, and may be quiet in between."""

    def __init__(self, tenant: Tenant, quiet: Arrivals, idle_s: float, until_s: float) -> None:
        """`until_s`: when it has lasted long enough, on the loop's clock."""
        self.tenant = tenant
        self._quiet = quiet
        self._idle_s = idle_s
        self._until_s = until_s
        self._ending: Draining | None = None

    async def next(self, message: Callable[[], Awaitable[T]]) -> T:
        """The next request, once it comes. Raises RequestTimeout when the call was quiet for too long, Overloaded when
        its place was needed, Draining when it must be opened anew.
        """
        left_s = self._until_s - asyncio.get_running_loop().time()
        if self._ending is None and left_s <= 0:
            self._ending = _stopping("this call is older than gateway.connection_max_age_s: open a new one")
        return await self._quiet.next(self.tenant.name, self._unless_ending(message), self._idle_s)

    def _unless_ending(self, message: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
        """Looks when its turn has come: the gateway may have begun to stop while it waited for that."""

        async def checked() -> T:
            if self._ending is not None:
                raise self._ending
            return await message()

        return checked

    def finish(self, error: Draining) -> None:
        """Take no further request on it."""
        self._ending = error


class OpenRequests:
    """Counts them, bounds them, and ends them when the gateway stops."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._leases: set[Lease] = set()
        self._sessions: set[Session] = set()
        self._by_tenant: Counter[str] = Counter()  # sessions
        # A quiet session may be receiving its next message.
        self._quiet = body_arrivals("the next request of this call (see gateway.stream_idle_timeout_s)", config)
        self.draining = False

    def __len__(self) -> int:
        return len(self._leases)

    def check(self) -> None:
        """Raises Draining or Overloaded if nothing more is taken now. Ends a quiet session to make room."""
        if self.draining:
            raise _stopping("this gateway is stopping: send the request again")
        most = self._config.max_streams
        if len(self._leases) + len(self._quiet) >= most and not self._quiet.evict():
            raise Overloaded(
                f"this gateway holds {most} requests, its limit (gateway.max_streams)",
                retry_after_s=_jittered(_RETRY_FULL_S), plane=Plane.GATEWAY, reason=Reason.MAX_STREAMS,
            )  # fmt: skip

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Counts the request as open."""
        self._leases.add(lease)
        try:
            yield
        finally:
            self._leases.discard(lease)

    @contextmanager
    def session(self, tenant: Tenant) -> Iterator[Session]:
        """A call that brings one request after another. Raises Draining, Overloaded, or QuotaExceeded: at each gateway
        a tenant may have as many as its `max_streams`.
        """
        self.check()
        if tenant.max_streams is not None and self._by_tenant[tenant.name] >= tenant.max_streams:
            what = f"tenant {tenant.name} has {tenant.max_streams} streams of requests open, its limit (max_streams)"
            raise QuotaExceeded(
                what, retry_after_s=_jittered(_RETRY_FULL_S), plane=Plane.QUOTA, reason=Reason.MAX_STREAMS
            )
        until_s = asyncio.get_running_loop().time() + self._config.connection_max_age_s
        session = Session(tenant, self._quiet, self._config.stream_idle_timeout_s, until_s)
        self._sessions.add(session)
        self._by_tenant[tenant.name] += 1
        try:
            yield session
        finally:
            self._sessions.discard(session)
            self._by_tenant[tenant.name] -= 1
            if not self._by_tenant[tenant.name]:
                del self._by_tenant[tenant.name]

    async def drain(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end for `grace_s` seconds, then end it with an error."""
        self.draining = True
        bye = _stopping("this gateway is stopping: open the call again")
        self._quiet.end_all(bye)
        for session in self._sessions:
            session.finish(bye)
        await self._until_none(grace_s)
        error = f"the gateway stopped and this request was not done within {grace_s:g} s: send it again"
        for lease in list(self._leases):
            lease.cut(_stopping(error))
        await self._until_none(1.0)

    async def _until_none(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while self._leases and loop.time() < until_s:
            await asyncio.sleep(_DRAIN_POLL_S)


def body_arrivals(what: str, config: GatewayConfig) -> Arrivals:
    """Returns a bound on messages that arrive at once: as many of the largest size as `max_bodies_mib` holds."""
    most = max(1, config.max_bodies_mib // config.max_body_mib)
    return Arrivals(what, most, _LEAST_ARRIVAL_S, Reason.BODIES)


def _stopping(message: str) -> Draining:
    return Draining(message, retry_after_s=_jittered(RETRY_DRAINING_S), plane=Plane.GATEWAY, reason=Reason.DRAINING)


def _jittered(seconds: float) -> float:
    return seconds * (1 + _JITTER * random.random())
