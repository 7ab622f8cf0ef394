"""grpc.health.v1 over the pipeline's readiness. No lock: a watcher that reads nothing blocks nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import suppress

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TELL_S = 1.0
_TELL_POLL_S = 0.01
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Names: a model's; "" and the gRPC services' own, which are fine while some model is ready."""

    def __init__(self, ready: Callable[[], Mapping[str, bool]], services: Collection[str], poll_s: float) -> None:
        self._ready = ready
        self._services = services
        self._poll_s = poll_s
        self._closing = asyncio.Event()
        self._watchers = 0

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """See the protocol."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Status(status=status)

    async def List(
        self, request: health_pb2.HealthListRequest, context: ServicerContext
    ) -> health_pb2.HealthListResponse:
        """See the protocol."""
        names = sorted({*self._services, *self._ready()})
        return health_pb2.HealthListResponse(statuses={name: _Status(status=self._status(name)) for name in names})

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """See the protocol. Ends when the server stops."""
        last: int | None = None
        self._watchers += 1
        try:
            while True:
                closing = self._closing.is_set()  # asked first: what is set during a write is still told
                if (status := self._status(request.service)) != last:
                    yield _Status(status=status)
                    last = status
                if closing:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._poll_s)
        finally:
            self._watchers -= 1

    async def close(self) -> None:
        """Not serving from now on. When this returns, all watchers that read at all have been told."""
        self._closing.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                while self._watchers:
                    await asyncio.sleep(_TELL_POLL_S)

    def _status(self, service: str) -> int:
        ready = self._ready()
        if service in self._services:
            serving = any(ready.values())
        elif service in ready:
            serving = ready[service]
        else:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if serving and not self._closing.is_set() else _Status.NOT_SERVING)
