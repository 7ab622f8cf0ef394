"""Which attention replicas are live, and what each last said of itself, by one stream from each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import aiohttp
import msgspec

from cluster.config import InternalTlsConfig
from cluster.tls.contexts import internal_client_ssl_context
from deployments.directory.members import ReplicaEndpoint
from routing.requests.request import ReplicaLoad

_CONNECT_TIMEOUT_S = 2.0
_RECONNECT_S = (0.1, 2.0)  # first and longest pause
_READ_BUFFER_BYTES = 256 * 1024
_READ_UP_S = 0.2  # to read what came while this process could not
T = TypeVar("T")

logger = logging.getLogger(__name__)


class ReplicaLoads:
    """Follows the attention replicas that the directory names. Belongs to one event loop."""

    def __init__(
        self,
        tls: InternalTlsConfig | None,
        silence_s: float,
        on_change: Callable[[], None],
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        """A replica that says nothing for `silence_s` takes no requests. `on_change` is called whenever `current()`
        would answer differently, `on_lost` with the id of a replica whose requests in flight are lost too.
        """
        self._tls = tls
        self._silence_s = silence_s
        self._on_change = on_change
        self._on_lost = on_lost
        self._session: aiohttp.ClientSession | None = None
        self._endpoints: dict[str, ReplicaEndpoint] = {}
        self._loads: dict[str, ReplicaLoad] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}

    def set_endpoints(self, endpoints: Sequence[ReplicaEndpoint]) -> None:
        """The replicas that the directory knows. One that it no longer knows stays for as long as it says itself that
        it takes requests: a directory that has just been restarted knows nobody yet.
        """
        for endpoint in endpoints:
            if endpoint.leaving:
                self._forget(endpoint.replica_id)  # what is in flight goes on
            elif self._endpoints.get(endpoint.replica_id) != endpoint:
                self._forget(endpoint.replica_id)
                self._endpoints[endpoint.replica_id] = endpoint
                self._watching[endpoint.replica_id] = asyncio.create_task(self._watch(endpoint))
        known = {endpoint.replica_id for endpoint in endpoints}
        for replica_id in [name for name in self._endpoints if name not in known and name not in self._loads]:
            self._forget(replica_id)

    def current(self) -> list[ReplicaLoad]:
        """What each live replica last said."""
        return list(self._loads.values())

    def endpoint(self, replica_id: str) -> ReplicaEndpoint | None:
        """Where a replica takes requests; None if it is gone."""
        return self._endpoints.get(replica_id)

    async def close(self) -> None:
        """Follow nobody any more."""
        for replica_id in list(self._watching):
            self._forget(replica_id)
        if self._session is not None:
            await self._session.close()

    async def _watch(self, endpoint: ReplicaEndpoint) -> None:
        pause_s, longest_s = _RECONNECT_S
        silent = False  # once said, a replica's absence is not said again until it was back
        while True:
            try:
                async for load in self._listen(endpoint):
                    self._loads[endpoint.replica_id] = load
                    self._tell_change()
                    pause_s, silent = _RECONNECT_S[0], False
                reason = "it takes no more requests"  # those in flight may end
            except Exception as error:  # whatever a broken replica provokes: the watch must not die and call it live
                reason = f"{type(error).__name__}: {error}"
                self._on_lost(endpoint.replica_id)
            if not silent:
                silent = True
                logger.warning("attention replica %s takes no requests: %s", endpoint.replica_id, reason)
            if self._loads.pop(endpoint.replica_id, None) is not None:
                self._tell_change()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _tell_change(self) -> None:
        """A bug in whoever listens must not end the watch: the replica would be taken to be as it was for ever."""
        try:
            self._on_change()
        except Exception:
            logger.exception("the replicas' newest loads could not be taken")

    async def _listen(self, endpoint: ReplicaEndpoint) -> AsyncGenerator[ReplicaLoad, None]:
        url = endpoint.url + "/deepsplit/load"
        request = self._client().get(url, headers=endpoint.authorization())
        async with await self._unless_silent(request) as response:
            response.raise_for_status()
            while line := await self._unless_silent(response.content.readline()):
                yield msgspec.json.decode(line, type=ReplicaLoad)

    async def _unless_silent(self, awaitable: Awaitable[T]) -> T:
        """Its result. Raises TimeoutError if nothing comes, and not because this process was busy: a timer that is
        long due fires before what has come meanwhile is read.
        """
        coming = asyncio.ensure_future(awaitable)
        try:
            for wait_s in (self._silence_s, _READ_UP_S):
                await asyncio.wait((coming,), timeout=wait_s)
                if coming.done():
                    return coming.result()
            raise TimeoutError(f"nothing heard for {self._silence_s:g} s")
        finally:
            coming.cancel()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = replica_session(self._tls)
        return self._session

    def _forget(self, replica_id: str) -> None:
        self._endpoints.pop(replica_id, None)
        if (watching := self._watching.pop(replica_id, None)) is not None:
            watching.cancel()
        if self._loads.pop(replica_id, None) is not None:
            self._tell_change()


def replica_session(tls: InternalTlsConfig | None) -> aiohttp.ClientSession:
    """Returns a session for requests to attention replicas. Only the time to get a connection is bounded."""
    ssl_context = True if tls is None else internal_client_ssl_context(tls)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=ssl_context, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        read_bufsize=_READ_BUFFER_BYTES,
        trust_env=False,
    )
