"""The gateway's connections to the attention replicas: one for what each says of itself, a pool for requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import aiohttp
import msgspec

from cluster.config import InternalTlsConfig
from cluster.errors import ReplicaUnavailable
from deployments.fleet import ReplicaEndpoint, ResponseHead
from routing.request import ReplicaLoad
from routing.tls import internal_client_ssl_context

CONNECT_TIMEOUT_S = 2.0
_RECONNECT_S = (0.1, 2.0)  # first and longest pause
_READ_BUFFER_BYTES = 256 * 1024
_READ_UP_S = 0.2  # to read what came while this process could not
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Replicas:
    """Live replicas and their loads; requests on their way. Belongs to one event loop."""

    def __init__(self, tls: InternalTlsConfig | None, silence_s: float, on_change: Callable[[], None]) -> None:
        """A replica that says nothing for `silence_s` takes no requests. `on_change` is called whenever `loads()` would
        answer differently.
        """
        self._on_change = on_change
        self._silence_s = silence_s
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._endpoints: dict[str, ReplicaEndpoint] = {}
        self._loads: dict[str, ReplicaLoad] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._in_flight: dict[str, set[_Exchange]] = {}

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

    def loads(self) -> list[ReplicaLoad]:
        """What each live replica last said."""
        return list(self._loads.values())

    def in_flight(self) -> dict[str, int]:
        """Requests on their way, by replica."""
        return {replica_id: len(exchanges) for replica_id, exchanges in self._in_flight.items()}

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, request_id: str
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """A ResponseHead and then the body as it arrives. Closing it aborts the generation.

        Raises ReplicaUnavailable when the replica is unknown, cannot be reached, or breaks off.
        """
        endpoint = self._endpoints.get(replica_id)
        if endpoint is None:
            raise ReplicaUnavailable(f"attention replica {replica_id} is gone")
        headers = _headers(endpoint) | {"x-request-id": request_id}
        if body:
            headers["content-type"] = "application/json"
        exchange = _Exchange()
        self._in_flight.setdefault(replica_id, set()).add(exchange)
        try:
            async with exchange.answer(
                self._client().request(method, endpoint.url + path, data=body or None, headers=headers)
            ) as response:
                yield ResponseHead(response.status, response.headers.get("content-type", "application/json"))
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ReplicaUnavailable(f"attention replica {replica_id}: {type(error).__name__}: {error}") from error
        finally:
            self._in_flight[replica_id].discard(exchange)
            if not self._in_flight[replica_id]:
                del self._in_flight[replica_id]

    async def close(self) -> None:
        """Break all connections."""
        for replica_id in list(self._watching):
            self._forget(replica_id)
        for replica_id in list(self._in_flight):
            self._abort(replica_id)  # closing the session alone leaves their readers waiting
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            ssl_context = True if self._tls is None else internal_client_ssl_context(self._tls)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=ssl_context, keepalive_timeout=30),
                # The door bounds every request; here only the time to get a connection.
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
                auto_decompress=False,
                read_bufsize=_READ_BUFFER_BYTES,
                trust_env=False,
            )
        return self._session

    async def _watch(self, endpoint: ReplicaEndpoint) -> None:
        pause_s, longest_s = _RECONNECT_S
        silent = False  # once said, a replica's absence is not said again until it was back
        while True:
            try:
                async for load in self._listen(endpoint):
                    self._loads[endpoint.replica_id] = load
                    self._on_change()
                    pause_s, silent = _RECONNECT_S[0], False
                reason = "it takes no more requests"  # those in flight may end
            except (
                Exception
            ) as error:  # whatever a broken replica provokes: a watch that died would call it live forever
                reason = f"{type(error).__name__}: {error}"
                self._abort(endpoint.replica_id)  # of a hung or cut-off replica they would never end by themselves
            if not silent:
                silent = True
                logger.warning("attention replica %s takes no requests: %s", endpoint.replica_id, reason)
            if self._loads.pop(endpoint.replica_id, None) is not None:
                self._on_change()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def _listen(self, endpoint: ReplicaEndpoint) -> AsyncGenerator[ReplicaLoad, None]:
        url = endpoint.url + "/deepsplit/load"
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S)
        request = self._client().get(url, headers=_headers(endpoint), timeout=timeout)
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

    def _abort(self, replica_id: str) -> None:
        for exchange in list(self._in_flight.get(replica_id, ())):
            exchange.abort()

    def _forget(self, replica_id: str) -> None:
        self._endpoints.pop(replica_id, None)
        if (watching := self._watching.pop(replica_id, None)) is not None:
            watching.cancel()
        if self._loads.pop(replica_id, None) is not None:
            self._on_change()


class _Exchange:
    """One request in flight, which can be broken off from outside at any moment."""

    def __init__(self) -> None:
        self._opening: asyncio.Timeout | None = None
        self._response: aiohttp.ClientResponse | None = None

    @contextlib.asynccontextmanager
    async def answer(
        self, request: contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response, once its head is there; closed at the end."""
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(None) as self._opening:
                self._response = await stack.enter_async_context(request)
            self._opening = None
            yield self._response

    def abort(self) -> None:
        """Whoever waits for the head or for a chunk gets TimeoutError or aiohttp.ClientError."""
        if self._opening is not None:
            self._opening.reschedule(asyncio.get_running_loop().time())
        elif self._response is not None:
            self._response.close()


def _headers(endpoint: ReplicaEndpoint) -> dict[str, str]:
    return {"authorization": f"Bearer {endpoint.token}"}
