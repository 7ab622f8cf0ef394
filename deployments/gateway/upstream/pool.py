"""Requests on their way to attention replicas, over a pool of connections to each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping

import aiohttp

from cluster.config import InternalTlsConfig
from cluster.errors import ReplicaLost, ReplicaUnavailable
from deployments.admission.replica_loads import ReplicaLoads, replica_session
from deployments.directory.members import ResponseHead
from routing.requests.request import ReplicaLoad


class ReplicaPool:
    """Sends requests to replicas. Belongs to one event loop."""

    def __init__(self, tls: InternalTlsConfig | None, replicas: ReplicaLoads) -> None:
        self._tls = tls
        self._replicas = replicas
        self._session: aiohttp.ClientSession | None = None
        self._in_flight: dict[str, set[_Exchange]] = {}

    def in_flight(self) -> dict[str, int]:
        """Requests on their way, by replica."""
        return {replica_id: len(exchanges) for replica_id, exchanges in self._in_flight.items()}

    def loads(self) -> list[ReplicaLoad]:
        """What each live replica last said."""
        return self._replicas.current()

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        """A ResponseHead and then the body as it arrives. Closing it aborts the generation.

        Raises ReplicaUnavailable when the replica is unknown or cannot be reached, ReplicaLost when it breaks off.
        """
        endpoint = self._replicas.endpoint(replica_id)
        if endpoint is None:
            raise ReplicaUnavailable(f"attention replica {replica_id} is gone")
        sent = {**headers, **endpoint.authorization(), "content-type": "application/json"}
        exchange = _Exchange()
        self._in_flight.setdefault(replica_id, set()).add(exchange)
        try:
            async with exchange.answer(
                self._client().request(method, endpoint.url + path, data=body or None, headers=sent)
            ) as response:
                yield ResponseHead(response.status, response.headers.get("content-type", "application/json"))
                async for chunk in response.content.iter_any():
                    yield chunk
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ReplicaUnavailable(f"attention replica {replica_id} cannot be reached: {reason}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ReplicaLost(f"attention replica {replica_id}: {type(error).__name__}: {error}") from error
        finally:
            self._in_flight[replica_id].discard(exchange)
            if not self._in_flight[replica_id]:
                del self._in_flight[replica_id]

    def abort(self, replica_id: str) -> None:
        """Break off what a replica has: of a hung or cut-off one it would never end by itself."""
        for exchange in list(self._in_flight.get(replica_id, ())):
            exchange.abort()

    async def close(self) -> None:
        """Break all connections."""
        for replica_id in list(self._in_flight):
            self.abort(replica_id)  # closing the session alone leaves their readers waiting
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = replica_session(self._tls)
        return self._session


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


def longest_context(loads: Iterable[ReplicaLoad]) -> int | None:
    """Returns the longest prompt plus completion, in tokens, that any of the replicas takes; None: none has said."""
    return max((load.max_model_len for load in loads), default=0) or None
