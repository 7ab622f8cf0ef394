"""What the gateway costs: added time, CPU and memory, against the replica's own HTTP port in the same run.

A real gateway process in front of a fake replica, which emits a token to each stream at a stated pace. Both servers
are asked in turn, in random order; differences are taken pair by pair, so that noise hits both alike.

    python -m benchmarks.gateway_cost
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack

import psutil

from benchmarks.fakes.gateway_process import GatewayProcess
from benchmarks.fakes.replica_process import FakeReplica, FakeReplicas
from benchmarks.fakes.service_model import ServiceModel
from benchmarks.measuring.closed_loop import closed_loop
from benchmarks.measuring.free_port import free_port
from benchmarks.measuring.paired import Added, Asked, Server, compare, spread
from benchmarks.measuring.sse_client import Connection, Reply, connect
from cluster.config import Config
from deployments.directory.members import ReplicaEndpoint

MODEL = "fake"
TARGETS = "targets: TTFT +3 ms, time per token +0.3 ms, 1000 idle streams in 200 MB"
# Steps of 5 ms whatever runs, nearly free prefill: what is measured is not the engine. A request that comes during a
# step waits for its end, so a difference of 5 ms more or less is chance; medians of many pairs even it out.
PACED = ServiceModel(slots=2048, kv_cache_tokens=2**24, base_s=0.005, sequence_s=0.0, prefill_tokens_per_s=1e7)
FAST = ServiceModel(slots=2048, kv_cache_tokens=2**24, base_s=0.0005, sequence_s=0.0, prefill_tokens_per_s=1e7)
IDLE = ServiceModel(slots=2048, kv_cache_tokens=2**24, base_s=5.0, sequence_s=0.0, prefill_tokens_per_s=1e7)


def fake_config(port: int) -> Config:
    """A gateway in front of fakes, whose replies no policy shapes."""
    return Config.model_validate(
        {
            "model": {"path": "/nonexistent", "name": MODEL},
            "gateway": {"port": port, "grpc_port": free_port(), "max_streams": 4096},
            "admission": {"mode": "off"},
        }
    )


def servers(endpoint: ReplicaEndpoint, url: str, gateway: Sequence[psutil.Process]) -> tuple[Server, Server]:
    """The replica's own port and the gateway."""
    direct = Server(endpoint.url, {"authorization": f"Bearer {endpoint.token}"}, [psutil.Process(endpoint.pid)])
    return direct, Server(url, {}, gateway)


def report(name: str, count: int, added: Added) -> None:
    """One line: what the gateway adds."""
    p99_ms = sorted(added.ttft_ms)[int(0.99 * len(added.ttft_ms))]
    print(
        f"{name:11}{count:>8}{statistics.median(added.direct_ttft_ms):>12.1f}{spread(added.ttft_ms):>24}{p99_ms:>9.2f}"
        f"{statistics.median(added.direct_tpot_ms):>14.2f}{spread(added.tpot_ms):>26}{spread(added.delay_ms):>26}",
        flush=True,
    )


def report_head() -> None:
    """Above the lines."""
    print("ms; added: median of pairs [quartiles]")
    print(f"{'':11}{'streams':>8}{'direct TTFT':>12}{'added TTFT':>24}{'p99':>9}{'direct TPOT':>14}"
          f"{'added time per token':>26}{'added arrival of a token':>26}")  # fmt: skip


async def times(name: str, direct: Server, gateway: Server, asked: Asked, streams: Sequence[int], pairs: int) -> None:
    """Compare and print, for each number of concurrent streams."""
    for count in streams:
        report(name, count, await compare(direct, gateway, asked, count, 64, max(8, pairs // count)))


async def cpu(direct: Server, gateway: Server, asked: Asked, seconds: float) -> None:
    """Requests per core, and CPU per token of streams that come as fast as they can."""

    async def ask(connection: Connection) -> Reply:
        return await connection.request("POST", asked.path, asked.body(1, stream=False), gateway.headers)

    rates, costs = [], []
    for _ in range(3):
        rate, cost_s = await closed_loop(gateway.url, ask, gateway.cpu_s, 16, seconds)
        rates.append(rate)
        costs.append(cost_s)
    cost_s = statistics.median(costs)
    print(f"short requests: {1 / cost_s:.0f}/s per core of the gateway ({1e6 * cost_s:.0f} us CPU each; "
          f"{statistics.median(rates):.0f}/s seen beside client and fake)")  # fmt: skip
    tokens, count = 400, 8
    before_s = gateway.cpu_s()
    await compare(direct, gateway, asked, count, tokens, 4)
    per_token_s = (gateway.cpu_s() - before_s) / (count * tokens * 6)  # with the two warm-up turns
    print(f"streams: {1e6 * per_token_s:.0f} us CPU of the gateway per token ({1 / per_token_s:.0f} tokens/s per core)")


async def idle(gateway: Server, asked: Asked, count: int) -> None:
    """Memory of streams that have begun and wait for their next token."""
    async with AsyncExitStack() as stack:
        warm = await connect(gateway.url)
        await warm.request("POST", asked.path, asked.body(2), gateway.headers)
        before = gateway.rss_bytes()

        async def one() -> Connection:
            connection = await stack.enter_async_context(await connect(gateway.url))
            await connection.request("POST", asked.path, asked.body(50), gateway.headers, events=1)
            return connection

        await asyncio.gather(*(one() for _ in range(count)))
        after = gateway.rss_bytes()
        added = after - before
        print(f"{count} idle streams: {added / 1e6:.0f} MB added ({added / count / 1e3:.0f} kB each), "
              f"{after / 1e6:.0f} MB in all")  # fmt: skip


def over_fake(streams: Sequence[int], pairs: int, seconds: float) -> None:
    """All measurements."""
    asked = Asked("/v1/completions", {"model": MODEL})
    chat = Asked("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "def split("}]})
    for service in (PACED, FAST, IDLE):
        config = fake_config(free_port())
        with ExitStack() as stack:
            replicas = stack.enter_context(FakeReplicas([FakeReplica("r0", service, MODEL, None)]))
            gateway = stack.enter_context(GatewayProcess(config, replicas.endpoints))
            process = psutil.Process(gateway.process.pid)
            direct, behind = servers(replicas.endpoints[0], f"http://{gateway.address}", [process])
            if service is PACED:
                print(f"gateway alone: {behind.rss_bytes() / 1e6:.0f} MB")
                report_head()
                asyncio.run(times("completion", direct, behind, asked, streams, pairs))
                asyncio.run(times("chat", direct, behind, chat, streams, pairs))
            elif service is FAST:
                asyncio.run(cpu(direct, behind, asked, seconds))
            else:
                asyncio.run(idle(behind, asked, 1000))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="concurrent streams")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of streams per line, at least")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one closed-loop measurement")
    args = parser.parse_args()
    print(TARGETS)
    over_fake(args.streams, args.pairs, args.seconds)


if __name__ == "__main__":
    main()
