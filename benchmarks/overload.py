"""Overload: a real gateway process over stand-in replicas, at multiples of their measured capacity.

    python -m benchmarks.overload [--seconds 20] [--loads 1 2 5 10]

Capacity is measured first (closed loop, every decode slot taken, nothing shed). Then each load, open loop with Poisson
arrivals, with `admission.mode: enforce` and with `off`. The replicas are stand-ins with a stated service model
(`benchmarks.overload_mix`), so the load can exceed what this machine could compute. A load lasts `--seconds` after
5 s that are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.free_port import free_port
from benchmarks.gateway_process import GatewayProcess
from benchmarks.load import Client, closed_loop, open_loop
from benchmarks.overload_mix import EOS_EVERY, MODEL, OBJECTIVES, REPLICAS, SERVICE, Mix
from benchmarks.overload_report import Run, Window, figures, print_load, print_verdict
from benchmarks.standin_fleet import Standin, StandinFleet
from cluster.config import Config

WARM_UP_S = 5.0
CAPACITY_S = 10.0
_PAUSE_S = 1.0  # between loads: what was cut off is aborted


def config(mode: str, keys_file: Path) -> Config:
    """The gateway's. No hard bound may hide what admission does."""
    gateway = {"port": free_port(), "grpc_port": None, "keys_file": str(keys_file), "max_streams": 100_000}
    admission = OBJECTIVES.model_copy(update={"mode": mode}).model_dump()
    return Config.model_validate(
        {"model": {"path": "standin", "name": MODEL}, "gateway": gateway, "admission": admission}
    )


class Bench:
    """A gateway in one mode, its replicas, and a client."""

    def __init__(self, mix: Mix, gateway: GatewayProcess, fleet: StandinFleet) -> None:
        self._mix = mix
        self._client = Client(f"http://{gateway.address}")
        pids = {"gateway": gateway.process.pid, "stand-ins": fleet.process.pid, "clients": os.getpid()}
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}

    async def capacity(self) -> tuple[float, float]:
        """(requests, tokens) per second with every slot taken."""
        begun_s = time.monotonic()
        window = Window(begun_s + WARM_UP_S, begun_s + WARM_UP_S + CAPACITY_S)
        sent = await closed_loop(self._client, self._mix.endless(), REPLICAS * SERVICE.slots, WARM_UP_S + CAPACITY_S)
        found = figures(sent, window, OBJECTIVES)
        assert not found.failures, found.failures
        ended = sum(one.ended_s is not None and window.begin_s <= one.ended_s < window.end_s for one in sent)
        await asyncio.sleep(_PAUSE_S)
        return ended / window.seconds, found.throughput

    async def load(self, per_s: float, seconds: float) -> Run:
        """One open-loop load."""
        arrivals = self._mix.poisson(per_s, WARM_UP_S + seconds)
        before = {name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()}
        begun_s = time.monotonic()
        sent = await open_loop(self._client, arrivals, WARM_UP_S + seconds)
        cpu = {
            name: (sum(process.cpu_times()[:2]) - before[name]) / (WARM_UP_S + seconds)
            for name, process in self._processes.items()
        }
        window = Window(begun_s + WARM_UP_S, begun_s + WARM_UP_S + seconds)
        await asyncio.sleep(_PAUSE_S)
        return Run(figures(sent, window, OBJECTIVES), cpu)

    def close(self) -> None:
        """Let go of idle connections."""
        self._client.close()


async def run(loads: Sequence[float], seconds: float, folder: Path) -> None:
    """Everything, printed as it comes."""
    replicas = [Standin(f"replica-{number}", SERVICE, MODEL, EOS_EVERY) for number in range(REPLICAS)]
    runs: dict[str, list[Run]] = {}
    requests_per_s = tokens_per_s = 0.0
    for mode in ("off", "enforce"):
        mix = Mix(seed=1)
        keys_file = folder / f"{mode}.yaml"
        keys_file.write_text(mix.keys_file())
        keys_file.chmod(0o600)
        with StandinFleet(replicas) as fleet, GatewayProcess(config(mode, keys_file), fleet.endpoints) as gateway:
            bench = Bench(mix, gateway, fleet)
            if mode == "off":
                requests_per_s, tokens_per_s = await bench.capacity()
                print(f"{REPLICAS} stand-ins, {SERVICE}, one token in {EOS_EVERY} ends a sequence")
                print(f"capacity: {requests_per_s:.1f} requests/s, {tokens_per_s:.0f} tokens/s")
            runs[mode] = [await bench.load(factor * requests_per_s, seconds) for factor in loads]
            bench.close()
    for factor, enforced, off in zip(loads, runs["enforce"], runs["off"], strict=True):
        most = max(one.figures.goodput for one in runs["enforce"])
        print_load(f"{factor:g}x, {factor * requests_per_s:.0f} requests/s", enforced, off, most, OBJECTIVES)
    print_verdict([one.figures for one in runs["enforce"]], tokens_per_s, OBJECTIVES)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 5, 10], help="multiples of the capacity")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(args.loads, args.seconds, Path(folder)))


if __name__ == "__main__":
    main()
