"""A gateway, or the common admission of several, as a plain process without Ray, over replicas at given addresses.

For benchmarks and tests: the same `GatewayServer` and `AdmissionServer` that the Serve deployments wrap.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from cluster.config import Config
from deployments.admission.replica_loads import ReplicaLoads
from deployments.admission.server import AdmissionServer
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint
from deployments.gateway.server import GatewayServer
from monitoring.exporter import ProcessRegistry

START_S = 60.0


@dataclass(frozen=True)
class GatewayTask:
    """What the process reads from stdin first; Updates follow."""

    config: str  # Config as JSON
    endpoints: tuple[ReplicaEndpoint, ...]
    admission: AdmissionEndpoint | None = None  # where a gateway asks
    token: str | None = None  # set: be the common admission, with this token


@dataclass(frozen=True)
class Update:
    """The replicas and the admission that there are now, as the directory would tell."""

    endpoints: tuple[ReplicaEndpoint, ...]
    admission: AdmissionEndpoint | None = None


class GatewayProcess:
    """Starts it and waits until it listens; stops it with SIGTERM, which drains. `address` is the admission's."""

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[ReplicaEndpoint],
        admission: AdmissionEndpoint | None = None,
        token: str | None = None,
    ) -> None:
        task = GatewayTask(config.model_dump_json(), tuple(endpoints), admission, token)
        command = [sys.executable, "-m", "benchmarks.fakes.gateway_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._tell(task)
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"the gateway process ended with {self.process.wait()} before it listened")

    def update(self, endpoints: Sequence[ReplicaEndpoint], admission: AdmissionEndpoint | None = None) -> None:
        """Tell the process which replicas there are now. `admission` is for gateways."""
        self._tell(Update(tuple(endpoints), admission))

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.stop()

    def trim(self) -> None:
        """Soon, have the allocator give back what is free: what is left in memory is held by somebody."""
        self.process.send_signal(signal.SIGUSR1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Drain and end."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_s)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _tell(self, what: GatewayTask | Update) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(what).decode() + "\n")
        self.process.stdin.flush()


class _Told:
    """Reads the parent's lines; sets `stop` when there are no more."""

    def __init__(self, lines: asyncio.StreamReader, stop: asyncio.Event) -> None:
        self._lines = lines
        self._stop = stop

    async def follow(self, take: Callable[[Update], None]) -> None:
        while line := await self._lines.readline():
            take(msgspec.json.decode(line, type=Update))
        self._stop.set()


async def _gateway(task: GatewayTask, told: _Told, stop: asyncio.Event) -> None:
    config = Config.model_validate_json(task.config)

    async def status() -> dict[str, object]:
        return {}

    server = GatewayServer(config, status, ProcessRegistry())
    await server.start()
    server.set_endpoints(task.endpoints)
    if task.admission is not None:
        server.set_admission(task.admission)
    deadline = time.monotonic() + START_S
    while task.endpoints and not all(server.pipeline.ready().values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    print(f"{config.gateway.host}:{config.gateway.port}", flush=True)

    def take(update: Update) -> None:
        server.set_endpoints(update.endpoints)
        if update.admission is not None:
            server.set_admission(update.admission)

    following = asyncio.create_task(told.follow(take))
    await stop.wait()
    following.cancel()
    await server.stop(config.gateway.drain_timeout_s)


async def _admission(task: GatewayTask, told: _Told, stop: asyncio.Event) -> None:
    config = Config.model_validate_json(task.config)
    assert task.token is not None
    server = AdmissionServer(config.admission, time.monotonic, task.token, config.internal_tls)
    silence_s = config.gateway.replica_timeout_s
    replicas = ReplicaLoads(config.internal_tls, silence_s, lambda: server.set_loads(replicas.current()))
    replicas.set_endpoints(task.endpoints)
    print(await server.start("127.0.0.1"), flush=True)
    following = asyncio.create_task(told.follow(lambda update: replicas.set_endpoints(update.endpoints)))
    await stop.wait()
    following.cancel()
    await server.stop()
    await replicas.close()


async def _main() -> None:
    loop, lines, stop = asyncio.get_running_loop(), asyncio.StreamReader(), asyncio.Event()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    task = msgspec.json.decode(await lines.readline(), type=GatewayTask)
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, ctypes.CDLL(None).malloc_trim, 0)
    await (_gateway if task.token is None else _admission)(task, _Told(lines, stop), stop)


if __name__ == "__main__":
    asyncio.run(_main())
