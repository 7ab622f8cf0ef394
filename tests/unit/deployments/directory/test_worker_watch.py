"""The end of a real process is noticed at once; a stopped one is not taken for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import DispatchConfig, InternalTlsConfig
from deployments.directory.worker_watch import WorkerWatch


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.routing.tokens.worker_process", "0", "0", "32", "m"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


async def until(happened: list[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def test_a_killed_worker_is_noticed_at_once(worker: tuple[subprocess.Popen[str], str]) -> None:
    process, address = worker

    async def scenario() -> None:
        ended: list[str] = []
        watch = WorkerWatch(DispatchConfig(), None, ended.append)
        watch.watch({"a": address})
        watch.watch({"a": address})  # again changes nothing
        await asyncio.sleep(0.5)
        assert ended == []
        process.kill()
        process.wait()
        await until(ended, 3.0)
        assert ended == ["a"]
        watch.watch({})

    asyncio.run(scenario())


def test_an_end_that_closes_connections_first_is_noticed_too(worker: tuple[subprocess.Popen[str], str]) -> None:
    _, address = worker

    async def scenario() -> None:
        ended: list[str] = []
        open_now: list[asyncio.StreamWriter] = []

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)

        async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host, port = address.rsplit(":", 1)
            there_reader, there = await asyncio.open_connection(host, int(port))
            open_now.extend((writer, there))
            await asyncio.gather(pump(reader, there), pump(there_reader, writer))

        server = await asyncio.start_server(through, "127.0.0.1", 0)
        watch = WorkerWatch(DispatchConfig(), None, ended.append)
        watch.watch({"a": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"})
        await asyncio.sleep(0.5)
        for writer in open_now:
            writer.transport.abort()
        await asyncio.sleep(0.05)  # still listening: not the end yet
        server.close()
        await until(ended, 3.0)
        assert ended == ["a"]
        watch.watch({})

    asyncio.run(scenario())


def test_a_stopped_or_forgotten_worker_has_not_ended(worker: tuple[subprocess.Popen[str], str]) -> None:
    process, address = worker

    async def scenario() -> None:
        ended: list[str] = []
        settings = DispatchConfig(keepalive_interval_s=1.0, keepalive_timeout_s=0.5, connect_timeout_s=0.5)
        watch = WorkerWatch(settings, None, ended.append)
        watch.watch({"a": address})
        await asyncio.sleep(0.3)
        os.kill(process.pid, signal.SIGSTOP)
        await until(ended, 4.0)  # pings go unanswered meanwhile, and the connection is given up
        os.kill(process.pid, signal.SIGCONT)
        assert ended == []
        watch.watch({})
        process.kill()
        process.wait()
        await until(ended, 1.0)
        assert ended == []

    asyncio.run(scenario())


def test_certificates_that_are_not_here_leave_it_to_the_heartbeats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = {name: tmp_path / name for name in ("cert_file", "key_file", "ca_file")}
    tls = InternalTlsConfig.model_validate(nowhere)

    async def scenario() -> None:
        watch = WorkerWatch(DispatchConfig(), tls, lambda worker_id: pytest.fail(worker_id))
        watch.watch({"a": "127.0.0.1:1"})  # nobody listens there
        await asyncio.sleep(0.3)

    asyncio.run(scenario())
    assert "by its missing heartbeats alone" in caplog.text
