"""A gateway, or the common admission of several, as a plain process without Ray, over replicas at given addresses.

For benchmarks and tests: the same `GatewayServer` and `AdmissionServer` that the Serve deployments wrap.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from cluster.config import Config
from deployments.fleet import AdmissionEndpoint, ReplicaEndpoint
from deployments.fleet_admission import AdmissionServer
from deployments.gateway_server import GatewayServer
from deployments.replicas import Replicas

START_S = 60.0


@dataclass(frozen=True)
class Task:
    """What the process is told on stdin."""

    config: str  # Config as JSON
    endpoints: tuple[ReplicaEndpoint, ...]
    admission: AdmissionEndpoint | None = None  # where a gateway asks
    token: str | None = None  # set: be the common admission, with this token


class GatewayProcess:
    """Starts it and waits until it listens; stops it with SIGTERM, which drains. `address` is the admission's."""

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[ReplicaEndpoint],
        admission: AdmissionEndpoint | None = None,
        token: str | None = None,
    ) -> None:
        task = Task(config.model_dump_json(), tuple(endpoints), admission, token)
        command = [sys.executable, "-m", "benchmarks.gateway_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(task).decode() + "\n")
        self.process.stdin.flush()
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError(f"the gateway process ended with {self.process.wait()} before it listened")

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


async def _gateway(task: Task, stop: asyncio.Event) -> None:
    config = Config.model_validate_json(task.config)

    async def status() -> dict[str, object]:
        return {}

    server = GatewayServer(config, status)
    await server.start()
    server.set_endpoints(task.endpoints)
    if task.admission is not None:
        server.set_admission(task.admission)
    deadline = time.monotonic() + START_S
    while task.endpoints and not all(server.door.ready().values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    print(f"{config.gateway.host}:{config.gateway.port}", flush=True)
    await stop.wait()
    await server.stop(config.gateway.drain_timeout_s)


async def _admission(task: Task, stop: asyncio.Event) -> None:
    config = Config.model_validate_json(task.config)
    assert task.token is not None
    server = AdmissionServer(config.admission, time.monotonic, task.token, config.internal_tls)
    replicas = Replicas(config.internal_tls, lambda: server.fleet(replicas.loads()))
    replicas.set_endpoints(task.endpoints)
    print(await server.start("127.0.0.1"), flush=True)
    await stop.wait()
    await server.stop()
    await replicas.close()


async def _main() -> None:
    task = msgspec.json.decode(sys.stdin.readline(), type=Task)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await (_gateway if task.token is None else _admission)(task, stop)


if __name__ == "__main__":
    asyncio.run(_main())
