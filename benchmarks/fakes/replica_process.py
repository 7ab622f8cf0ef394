"""Several fake replicas in one process of their own, which reads their description as JSON from stdin."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from benchmarks.fakes.replica import FakeReplicaApp
from benchmarks.fakes.service_model import ServiceModel
from deployments.directory.members import ReplicaEndpoint


@dataclass(frozen=True)
class FakeReplica:
    """The description of one fake replica."""

    replica_id: str
    service: ServiceModel
    name: str
    eos_every: int | None


class FakeReplicas:
    """Starts the process and waits until all its replicas listen. Use as a context manager."""

    def __init__(self, replicas: Sequence[FakeReplica]) -> None:
        command = [sys.executable, "-m", "benchmarks.fakes.replica_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(replicas).decode() + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fakes ended with {self.process.wait()} before they listened")
        self.endpoints = msgspec.json.decode(line, type=tuple[ReplicaEndpoint, ...])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


async def _main() -> None:
    told = msgspec.json.decode(sys.stdin.readline(), type=tuple[FakeReplica, ...])
    replicas = [FakeReplicaApp(one.replica_id, one.service, one.name, one.eos_every) for one in told]
    print(msgspec.json.encode([await replica.start() for replica in replicas]).decode(), flush=True)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    # The parent's death closes stdin: no fake outlives its benchmark.
    asyncio.get_running_loop().add_reader(sys.stdin, stop.set)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(_main())
