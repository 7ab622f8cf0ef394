"""Who should listen: Ray Serve's proxy, or servers inside the gateway's replicas? What each way adds, side by side.

One trivial token source (no engine, fixed pace) is asked in turn, in one run, so that noise hits all ways alike:

  direct        the source's own HTTP port
  proxy         Serve's HTTP proxy -> ingress replica -> HTTP -> source
  proxy+handle  Serve's HTTP proxy -> ingress replica -> Serve handle -> replica with the source in it
  own port      Serve replica that runs its own uvicorn -> HTTP -> source

Delay of a token: from the moment that the source sent it to the moment that the client read it. CPU: of all processes
of a way, the source's included, so `direct` is the source alone; `per core in front` is short requests per second and
core of what a way has in front of the source. `python -m benchmarks.serve_proxy --help`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray import serve

from benchmarks.measuring.closed_loop import closed_loop
from benchmarks.measuring.free_port import free_port
from benchmarks.measuring.sse_client import Connection, Reply, connect
from benchmarks.serve_proxy.proxied_app import Ingress, OwnPort, SourceReplica
from benchmarks.serve_proxy.token_source import serve as serve_source

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Way:
    """One way to the source, and what was seen of it. Seconds; one entry per round unless said otherwise."""

    name: str
    url: str
    prefix: str
    processes: list[psutil.Process]
    ttft: dict[int, list[float]] = field(default_factory=dict)  # by concurrent streams: median of a round
    ttft_all: dict[int, list[float]] = field(default_factory=dict)  # one per stream
    delay: dict[int, list[float]] = field(default_factory=dict)
    tpot: dict[int, list[float]] = field(default_factory=dict)
    joined: list[int] = field(default_factory=lambda: [0, 0])  # events that shared a read with another one; all events
    stream_cpu: list[float] = field(default_factory=list)  # CPU seconds per token
    request_cpu: list[float] = field(default_factory=list)  # CPU seconds per short request
    rate: list[float] = field(default_factory=list)  # short requests per second
    left: list[float] = field(default_factory=list)  # one per client that left

    def cpu_s(self) -> float:
        """CPU time of all of the way's processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="times that every way is measured")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="concurrent streams")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of one stream")
    parser.add_argument("--pace-ms", type=float, default=30.0, help="time between two tokens of one stream")
    parser.add_argument("--haproxy", action="store_true", help="let Serve listen with HAProxy, not its Python proxy")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: at least 2, because quartiles are printed")
    if args.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # before Ray starts: Serve reads it in every process
    context = multiprocessing.get_context("spawn")
    source_port, serve_port = free_port(), free_port()
    source = context.Process(target=serve_source, args=("127.0.0.1", source_port), daemon=True)
    source.start()
    assert source.pid is not None
    with tempfile.TemporaryDirectory(prefix="deepsplit-", dir="/tmp") as folder:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": str(_REPOSITORY)}},
        )  # fmt: skip
        try:
            ways = _deploy(f"http://127.0.0.1:{source_port}", psutil.Process(source.pid), serve_port)
            asyncio.run(_measure(ways, args.rounds, args.streams, args.tokens, args.pace_ms))
        finally:
            serve.shutdown()
            ray.shutdown()
            source.kill()
    _report(ways, args.streams, args.pace_ms)


def _deploy(source: str, source_process: psutil.Process, port: int) -> list[Way]:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    proxied = f"http://127.0.0.1:{port}"
    serve.run(Ingress.bind(source), name="a", route_prefix="/a")
    handle_app = SourceReplica.bind()
    serve.run(Ingress.options(name="Ingress2").bind(handle_app), name="a2", route_prefix="/a2")
    own = serve.run(OwnPort.bind(source), name="b", route_prefix=None)
    own_url = f"http://127.0.0.1:{own.port.remote().result()}"
    ours = psutil.Process().children(recursive=True)
    listeners = [p for p in ours if "ProxyActor" in _title(p) or p.name() == "haproxy" or "HAProxy" in _title(p)]
    replicas = {name: [p for p in ours if f"ServeReplica:{name}:" in _title(p)] for name in ("a", "a2", "b")}
    assert listeners
    assert [len(found) for found in replicas.values()] == [1, 2, 1], replicas
    return [
        Way("direct", source, "", [source_process]),
        Way("proxy", proxied, "/a", [*listeners, *replicas["a"], source_process]),
        Way("proxy+handle", proxied, "/a2", [*listeners, *replicas["a2"]]),
        Way("own port", own_url, "", [*replicas["b"], source_process]),
    ]


async def _measure(ways: Sequence[Way], rounds: int, streams: Sequence[int], tokens: int, pace_ms: float) -> None:
    for turn in range(rounds + 1):  # the first one warms up
        for way in random.sample(ways, len(ways)):
            for count in streams:
                await _streams(way, count, tokens, pace_ms, keep=turn > 0)
            await _short_requests(way, keep=turn > 0)
            await _leave(way, keep=turn > 0)
        print(f"round {turn} of {rounds}", flush=True)


async def _streams(way: Way, count: int, tokens: int, pace_ms: float, keep: bool) -> None:
    body = json.dumps({"max_tokens": tokens, "pace_ms": pace_ms, "stream": True}).encode()

    async def one(connection: Connection) -> Reply:
        await asyncio.sleep(random.random() * pace_ms / 1e3)  # or all would be sent at the same instants
        return await connection.request("POST", f"{way.prefix}/v1/completions", body)

    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(await connect(way.url)) for _ in range(count)]
        before_s = way.cpu_s()
        replies = await asyncio.gather(*(one(connection) for connection in opened))
        used_s = way.cpu_s() - before_s
    assert all(reply.status == 200 and reply.done and len(reply.events()) == tokens for reply in replies)
    if not keep:
        return
    delays = [at_s - json.loads(event)["sent_s"] for reply in replies for at_s, event in reply.events()[1:]]
    firsts = [reply.ttft_s() - pace_ms / 1e3 for reply in replies]  # less the source's own
    way.ttft.setdefault(count, []).append(statistics.median(firsts))
    way.ttft_all.setdefault(count, []).extend(firsts)
    way.delay.setdefault(count, []).append(statistics.median(delays))
    way.tpot.setdefault(count, []).append(statistics.median(reply.tpot_s() for reply in replies))
    if count == max(way.ttft):
        way.stream_cpu.append(used_s / (count * tokens))
    for reply in replies:
        for _, data in reply.reads:
            events = data.count(b'"choices"')
            way.joined[0] += events if events > 1 else 0
            way.joined[1] += events


async def _short_requests(way: Way, keep: bool, clients: int = 16, seconds: float = 2.0) -> None:
    body = json.dumps({"max_tokens": 1, "stream": False}).encode()

    async def ask(connection: Connection) -> Reply:
        return await connection.request("POST", f"{way.prefix}/v1/completions", body)

    rate, cost_s = await closed_loop(way.url, ask, way.cpu_s, clients, seconds)
    if keep:
        way.request_cpu.append(cost_s)
        way.rate.append(rate)


async def _leave(way: Way, keep: bool) -> None:
    """A client goes away in the middle of a stream whose next token is far off: only the disconnect can end it."""
    request_id = uuid.uuid4().hex
    body = json.dumps({"max_tokens": 3, "pace_ms": 1500, "stream": True}).encode()
    connection = await connect(way.url)
    await connection.request("POST", f"{way.prefix}/v1/completions", body, {"x-request-id": request_id}, events=1)
    closed_s = connection.abort()
    left_s = None
    async with await connect(way.url) as asking:
        while left_s is None and time.monotonic() < closed_s + 10:
            await asyncio.sleep(0.05)
            left_s = (await asking.request("GET", f"{way.prefix}/left/{request_id}")).json()
    if keep:
        assert isinstance(left_s, float), f"{way.name}: the source never noticed"
        way.left.append(left_s - closed_s)


def _report(ways: Sequence[Way], streams: Sequence[int], pace_ms: float) -> None:
    direct = ways[0]
    print(f"\nadded to `direct`: median over rounds [quartiles], ms; a token every {pace_ms:g} ms per stream")
    print(f"{'':14}{'streams':>8}{'TTFT p50':>25}{'TTFT p99':>10}{'delay of a token p50':>24}{'time per token':>22}")
    for count in streams:
        for way in ways[1:]:
            p99_ms = 1e3 * (_quantile(way.ttft_all[count], 0.99) - _quantile(direct.ttft_all[count], 0.99))
            cells = [_added(w[count], d[count]) for w, d in zip(_times(way), _times(direct), strict=True)]
            print(f"{way.name:14}{count:>8}{cells[0]:>25}{p99_ms:>10.2f}{cells[1]:>24}{cells[2]:>22}")
    print(f"\n{'':14}{'CPU us/token':>13}{'CPU us/request':>16}{'requests/s':>12}{'per core in front':>19}"
          f"{'joined events':>15}{'client left, noticed after ms p50/max':>40}")  # fmt: skip
    for way in ways:
        cpu_s, left_ms = statistics.median(way.request_cpu), [1e3 * s for s in way.left]
        in_front_s = cpu_s - statistics.median(direct.request_cpu)
        print(
            f"{way.name:14}{1e6 * statistics.median(way.stream_cpu):>13.0f}{1e6 * cpu_s:>16.0f}"
            f"{statistics.median(way.rate):>12.0f}{f'{1 / in_front_s:.0f}' if in_front_s > 0 else '-':>19}"
            f"{way.joined[0] / way.joined[1]:>15.2%}{statistics.median(left_ms):>33.1f} /{max(left_ms):>5.1f}"
        )


def _times(way: Way) -> tuple[dict[int, list[float]], ...]:
    return way.ttft, way.delay, way.tpot


def _added(way: Sequence[float], direct: Sequence[float]) -> str:
    added = sorted(1e3 * (w - d) for w, d in zip(way, direct, strict=True))
    low, middle, high = statistics.quantiles(added, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _quantile(values: Sequence[float], fraction: float) -> float:
    return sorted(values)[min(len(values) - 1, int(fraction * len(values)))]


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


if __name__ == "__main__":
    main()
