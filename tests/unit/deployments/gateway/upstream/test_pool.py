"""The gateway's connections to fake replicas in processes of their own, killed and stopped, and to odd servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import psutil
import pytest
import uvloop

from benchmarks.fakes.replica_process import FakeReplica, FakeReplicas
from benchmarks.fakes.service_model import ServiceModel
from cluster.errors import ReplicaUnavailable
from deployments.admission import replica_loads
from deployments.admission.replica_loads import ReplicaLoads
from deployments.directory.members import ReplicaEndpoint, ResponseHead
from deployments.gateway.upstream.pool import ReplicaPool
from routing.requests.request import ReplicaLoad

pytestmark = pytest.mark.usefixtures("no_leftovers")

SERVICE = ServiceModel(slots=4, kv_cache_tokens=16_384, base_s=0.02, sequence_s=0.0, prefill_tokens_per_s=1e6)
BODY = json.dumps({"prompt": [1, 2, 3], "max_tokens": 500, "stream": True}).encode()  # 10 s
SHORT = json.dumps({"prompt": [1, 2, 3], "max_tokens": 3, "stream": True}).encode()
PATH = "/v1/completions"
HEADERS = {"x-request-id": "r1"}


@pytest.fixture
def fleet() -> Iterator[FakeReplicas]:
    with FakeReplicas([FakeReplica("a", SERVICE, "tiny", None)]) as one:
        yield one
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGCONT)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_loads, "_RECONNECT_S", (0.05, 0.2))


@dataclass
class World:
    """A gateway's replicas, and how often they changed."""

    changes: int = 0
    on_change: Callable[[], None] = lambda: None
    replicas: ReplicaLoads = field(init=False)
    pool: ReplicaPool = field(init=False)

    def __post_init__(self) -> None:
        self.replicas = ReplicaLoads(None, 1.0, self._changed, lambda replica_id: self.pool.abort(replica_id))
        self.pool = ReplicaPool(None, self.replicas)

    def _changed(self) -> None:
        self.changes += 1
        self.on_change()

    def live(self) -> list[str]:
        return [load.replica_id for load in self.replicas.current()]

    async def until(self, *live: str) -> None:
        await until(lambda: self.live() == list(live))

    async def whole(self, replica_id: str = "a", body: bytes = SHORT) -> bytes:
        async with aclosing(self.pool.send(replica_id, "POST", PATH, body, HEADERS)) as answer:
            head = await anext(answer)
            assert head == ResponseHead(200, "text/event-stream; charset=utf-8")
            return b"".join([chunk async for chunk in answer if isinstance(chunk, bytes)])

    async def running(self, body: bytes = BODY) -> asyncio.Task[bytes]:
        """A request that has got its first tokens."""
        task = asyncio.create_task(self.whole(body=body))
        await until(lambda: any(load.running for load in self.replicas.current()))
        assert not task.done()
        return task


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.01)


def sockets() -> int:
    return len([one for one in psutil.Process().net_connections("inet") if one.status != psutil.CONN_LISTEN])


def run(
    scenario: Callable[[World], Awaitable[None]],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    """The scenario, and that nothing is left of it: no task, no connection, no unfinished exchange."""

    async def bounded() -> None:
        before = sockets()
        world = World()
        async with asyncio.timeout(40):
            try:
                await scenario(world)
            finally:
                await world.replicas.close()
                await world.pool.close()
            assert world.live() == []
            assert not world.pool._in_flight
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
            await until(lambda: sockets() <= before)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(bounded())


def test_loads_and_a_stream(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        assert world.live() == []  # nothing is known before it says so itself
        await world.until("a")
        assert world.replicas.current() == [ReplicaLoad("a", SERVICE.slots, SERVICE.kv_cache_tokens)]
        assert (await world.whole()).endswith(b"data: [DONE]\n\n")
        assert world.changes >= 1

    run(scenario)


def test_an_answer_in_one_piece_and_a_refusal(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        async with aclosing(world.pool.send("a", "GET", "/v1/models", b"", HEADERS)) as answer:
            items = [item async for item in answer]
        assert items[0] == ResponseHead(200, "application/json")
        async with aclosing(world.pool.send("a", "POST", PATH, b"{}", HEADERS)) as answer:
            head = await anext(answer)
        assert isinstance(head, ResponseHead)
        assert head.status == 400

    run(scenario)


def test_closing_an_answer_aborts_the_generation(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        answer = world.pool.send("a", "POST", PATH, BODY, HEADERS)
        await anext(answer)
        await anext(answer)
        await until(lambda: any(load.running for load in world.replicas.current()))
        await answer.aclose()
        await until(lambda: not any(load.running for load in world.replicas.current()))

        cancelled = await world.running()
        cancelled.cancel()
        await until(lambda: not any(load.running for load in world.replicas.current()))

    run(scenario)


def test_an_unknown_replica() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(ReplicaUnavailable, match="replica a is gone"):
            await world.whole()

    run(scenario)


def test_killed_while_idle(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        await world.until("a")
        await world.whole()  # leaves a connection in the pool
        changes = world.changes
        fleet.process.kill()
        await world.until()
        assert world.changes > changes
        with pytest.raises(ReplicaUnavailable, match="replica a"):
            await world.whole()

    run(scenario)


def test_killed_in_mid_stream(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        stream = await world.running()
        fleet.process.kill()
        with pytest.raises(ReplicaUnavailable, match="replica a"):
            await stream
        await world.until()

    run(scenario)


def test_stopped_and_continued(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        loop = asyncio.get_running_loop()
        stream = await world.running()
        fleet.process.send_signal(signal.SIGSTOP)
        stopped = loop.time()
        unanswered = asyncio.create_task(world.whole())  # its head never comes
        for lost in (stream, unanswered):
            with pytest.raises(ReplicaUnavailable, match="replica a"):
                await lost
        assert loop.time() - stopped < 3
        assert world.live() == []
        fleet.process.send_signal(signal.SIGCONT)
        await world.until("a")
        assert (await world.whole()).endswith(b"[DONE]\n\n")

    run(scenario)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_gateway_that_was_busy_itself_loses_no_replica(
    fleet: FakeReplicas, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        stream = await world.running(json.dumps({"prompt": [1], "max_tokens": 100, "stream": True}).encode())
        seen: list[list[str]] = []
        world.on_change = lambda: seen.append(world.live())
        time.sleep(1.5)  # longer than a replica may be silent
        assert (await stream).endswith(b"data: [DONE]\n\n")
        assert [] not in seen
        assert len(seen) > 1

    run(scenario, loop_factory)


def test_a_wrong_token_is_refused_everywhere(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints([replace(fleet.endpoints[0], token="guessed")])
        async with aclosing(world.pool.send("a", "POST", PATH, SHORT, HEADERS)) as answer:
            head = await anext(answer)
        assert isinstance(head, ResponseHead)
        assert head.status == 401
        await asyncio.sleep(0.3)
        assert world.live() == []
        world.replicas.set_endpoints(fleet.endpoints)  # the directory has the right one
        await world.until("a")

    run(scenario)


def test_a_replica_that_comes_back_elsewhere(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        await world.until("a")
        fleet.process.kill()
        await world.until()
        with FakeReplicas([FakeReplica("a", SERVICE, "tiny", None), FakeReplica("b", SERVICE, "tiny", None)]) as again:
            world.replicas.set_endpoints(again.endpoints)
            await until(lambda: sorted(world.live()) == ["a", "b"])
            await world.whole("a")
            await world.whole("b")

    run(scenario)


def test_what_the_directory_forgets_stays_while_it_answers(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        await world.until("a")
        world.replicas.set_endpoints([])
        await world.whole()
        fleet.process.kill()
        await world.until()
        world.replicas.set_endpoints([])
        with pytest.raises(ReplicaUnavailable, match="is gone"):
            await world.whole()

    run(scenario)


def test_a_replica_whose_node_leaves_ends_what_it_has_and_gets_nothing_new(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        await world.until("a")
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 40, "stream": True}).encode()
        task = await world.running(body)
        world.replicas.set_endpoints([replace(endpoint, leaving=True) for endpoint in fleet.endpoints])
        assert world.live() == []  # although it says that it takes requests
        assert world.pool.in_flight() == {"a": 1}
        assert (await task).endswith(b"data: [DONE]\n\n")
        assert world.pool.in_flight() == {}

    run(scenario)


def test_closing_breaks_off_what_runs(fleet: FakeReplicas) -> None:
    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        stream = await world.running()
        await world.replicas.close()
        await world.pool.close()
        with pytest.raises(ReplicaUnavailable):
            await stream

    run(scenario)


# --- servers that no replica should be ---

LINE = msgspec.json.encode(ReplicaLoad("a", 4, 1000)) + b"\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def part(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


class Odd:
    """Says of its load what the test wants; leaves other requests without an end."""

    def __init__(self) -> None:
        self.says = part(LINE)  # every 50 ms
        self.then_close = False
        self.head = HEAD
        self.requests: list[bytes] = []
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request)
            writer.write(self.head)
            gone = asyncio.create_task(reader.read())
            while not gone.done():
                if b"/deepsplit/load" in request:
                    writer.write(self.says)
                    if self.then_close:
                        break
                await asyncio.sleep(0.05)
            gone.cancel()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def odd_server(world: World) -> AsyncIterator[Odd]:
    odd = Odd()
    server = await asyncio.start_server(odd.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    world.replicas.set_endpoints([ReplicaEndpoint("a", f"http://127.0.0.1:{port}", "secret", os.getpid(), "n")])
    await world.until("a")
    try:
        yield odd
    finally:
        await world.replicas.close()
        await world.pool.close()
        await until(lambda: odd.open == 0)
        server.close()


@pytest.mark.parametrize(
    "garbage",
    [
        part(b"garbage\n"),
        part(b"\n"),
        part(b"[]\n"),
        part(b'{"replica_id": "a"}\n'),
        part(b'{"replica_id": 7, "max_num_seqs": 4, "kv_cache_tokens": 1}\n'),
        part(b'{"replica_id": "\xff", "max_num_seqs": 4, "kv_cache_tokens": 1}\n'),
        part(b'{"x": ' + b"[" * 100_000 + b"\n"),
        part(b"x" * 3_000_000),  # a line without an end
        b"no chunk\r\n",
        b"ffffffffffffffffffff\r\n",
    ],
    ids=[
        "word",
        "empty",
        "list",
        "fields missing",
        "type",
        "no text",
        "deep",
        "endless line",
        "no chunk",
        "huge chunk",
    ],
)
def test_garbage_on_the_load_stream_is_a_loss_until_it_makes_sense(garbage: bytes) -> None:
    async def scenario(world: World) -> None:
        async with odd_server(world) as odd:
            stream = asyncio.create_task(world.whole())
            await until(lambda: any(b"POST" in request for request in odd.requests))
            odd.says = garbage
            await world.until()
            with pytest.raises(ReplicaUnavailable):
                await stream
            odd.says = part(LINE)
            await world.until("a")

    run(scenario)


def test_a_replica_that_drains_keeps_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        async with odd_server(world) as odd:
            stream = world.pool.send("a", "POST", PATH, BODY, HEADERS)
            await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            odd.says, odd.then_close = b"0\r\n\r\n", True  # the load stream comes to its end
            await world.until()
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert "takes no requests: it takes no more requests" in caplog.text
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await stream.aclose()

    run(scenario)


def test_a_load_stream_that_breaks_off_takes_requests_with_it() -> None:
    async def scenario(world: World) -> None:
        async with odd_server(world) as odd:
            stream = world.pool.send("a", "POST", PATH, BODY, HEADERS)
            await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            odd.says, odd.then_close = b"", True  # without the last chunk
            with pytest.raises(ReplicaUnavailable):
                await waiting
            await world.until()

    run(scenario)


def test_a_loss_between_two_reads_is_seen_at_the_next_one() -> None:
    async def scenario(world: World) -> None:
        async with odd_server(world) as odd:
            stream = world.pool.send("a", "POST", PATH, BODY, HEADERS)
            await anext(stream)
            odd.says, odd.then_close = b"", True
            await world.until()
            with pytest.raises(ReplicaUnavailable):
                await anext(stream)

    run(scenario)


def test_what_is_sent() -> None:
    async def scenario(world: World) -> None:
        async with odd_server(world) as odd:
            stream = world.pool.send("a", "POST", PATH, BODY, {"x-request-id": "r-42"})
            await anext(stream)
            await stream.aclose()
            posted = next(request for request in odd.requests if request.startswith(b"POST")).lower()
            for header in (b"authorization: bearer secret", b"x-request-id: r-42", b"content-type: application/json"):
                assert header + b"\r\n" in posted

    run(scenario)


def test_nobody_listens() -> None:
    async def scenario(world: World) -> None:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        world.replicas.set_endpoints([ReplicaEndpoint("a", f"http://127.0.0.1:{port}", "t", 1, "n")])
        with pytest.raises(ReplicaUnavailable, match="ClientConnectorError"):
            await world.whole()
        assert world.changes == 0

    run(scenario)


def test_the_environments_proxy_is_not_used(fleet: FakeReplicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def scenario(world: World) -> None:
        world.replicas.set_endpoints(fleet.endpoints)
        await world.until("a")

    run(scenario)
