"""Overload: a real gateway process over fake replicas, at multiples of their measured capacity.

    python -m benchmarks.overload [--replicas fake] [--seconds 20] [--loads 1 2 5 10]

Capacity is measured first (closed loop, every decode slot taken, nothing shed). Then each load, open loop with Poisson
arrivals, with `admission.mode: enforce` and with `off`. The replicas are fakes with a stated service model
(`benchmarks.overload.mix`), so the load can exceed what this machine could compute. With `--replicas demo` it
is the whole application with the demo model instead, and generator and model share the machine. A load lasts
`--seconds` after 5 s that are not counted. First, in virtual time: requests of 60 sequences beside requests of one
(`benchmarks.overload.mixed`).
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.fakes.gateway_process import GatewayProcess
from benchmarks.fakes.replica_process import FakeReplica, FakeReplicas
from benchmarks.measuring.free_port import free_port
from benchmarks.overload import demo as overload_demo
from benchmarks.overload.load import LoadClient, closed_loop, open_loop
from benchmarks.overload.mix import EOS_EVERY, MODEL, OBJECTIVES, REPLICAS, SERVICE, Mix
from benchmarks.overload.mixed import mixed
from benchmarks.overload.report import Run, Window, figures, print_load, print_verdict
from cluster.config import AdmissionConfig, Config

WARM_UP_S = 5.0
CAPACITY_S = 10.0
_PAUSE_S = 1.0  # between loads: what was cut off is aborted


@dataclass(frozen=True)
class Target:
    """Where a load goes, and the processes whose CPU time is told, children included."""

    address: str
    pids: Mapping[str, int]


@dataclass(frozen=True)
class Setup:
    """What is overloaded."""

    description: str
    model: str
    prompt_words: tuple[int, int]
    objectives: AdmissionConfig
    slots: int
    target: Callable[[AdmissionConfig, Path], AbstractContextManager[Target]]  # keys file


@contextmanager
def _fakes(admission: AdmissionConfig, keys_file: Path) -> Iterator[Target]:
    # No hard bound may hide what admission does.
    gateway = {"port": free_port(), "grpc_port": None, "keys_file": str(keys_file), "max_streams": 100_000}
    config = Config.model_validate(
        {"model": {"path": "fake", "name": MODEL}, "gateway": gateway, "admission": admission.model_dump()}
    )
    replicas = [FakeReplica(f"replica-{number}", SERVICE, MODEL, EOS_EVERY) for number in range(REPLICAS)]
    with FakeReplicas(replicas) as engines, GatewayProcess(config, engines.endpoints) as gateway_process:
        pids = {"gateway": gateway_process.process.pid, "fakes": engines.process.pid}
        yield Target(gateway_process.address, pids)


@contextmanager
def _demo(admission: AdmissionConfig, keys_file: Path) -> Iterator[Target]:
    with overload_demo.DemoApplication(admission, keys_file) as application:
        yield Target(application.address, {"application": application.process.pid})


SETUPS = {
    "fake": Setup(
        f"{REPLICAS} fakes, {SERVICE}, one token in {EOS_EVERY} ends a sequence",
        MODEL, (80, 240), OBJECTIVES, REPLICAS * SERVICE.slots, _fakes,
    ),
    "demo": Setup(
        f"the demo model, {overload_demo.SLOTS} slots",
        overload_demo.MODEL, overload_demo.PROMPT_WORDS, overload_demo.OBJECTIVES, overload_demo.SLOTS, _demo,
    ),
}  # fmt: skip


class Bench:
    """A gateway in one mode with what is behind it, and a client."""

    def __init__(self, setup: Setup, mix: Mix, target: Target) -> None:
        self._setup = setup
        self._mix = mix
        self._client = LoadClient(f"http://{target.address}")
        self._processes = {psutil.Process(): "clients"}
        for name, pid in target.pids.items():
            process = psutil.Process(pid)
            self._processes |= dict.fromkeys([process, *process.children(recursive=True)], name)

    async def capacity(self) -> tuple[float, float]:
        """(requests, tokens) per second with every slot taken."""
        begun_s = time.monotonic()
        window = Window(begun_s + WARM_UP_S, begun_s + WARM_UP_S + CAPACITY_S)
        sent = await closed_loop(self._client, self._mix.endless(), self._setup.slots, WARM_UP_S + CAPACITY_S)
        found = figures(sent, window, self._setup.objectives)
        assert not found.failures, found.failures
        ended = sum(one.ended_s is not None and window.begin_s <= one.ended_s < window.end_s for one in sent)
        await asyncio.sleep(_PAUSE_S)
        return ended / window.seconds, found.throughput

    async def load(self, per_s: float, seconds: float) -> Run:
        """One open-loop load."""
        arrivals = self._mix.poisson(per_s, WARM_UP_S + seconds)
        before = self._cpu_s()
        begun_s = time.monotonic()
        sent = await open_loop(self._client, arrivals, WARM_UP_S + seconds)
        cpu = dict.fromkeys(sorted(set(self._processes.values())), 0.0)
        for process, after_s in self._cpu_s().items():
            cpu[self._processes[process]] += (after_s - before[process]) / (WARM_UP_S + seconds)
        window = Window(begun_s + WARM_UP_S, begun_s + WARM_UP_S + seconds)
        await asyncio.sleep(_PAUSE_S)
        return Run(figures(sent, window, self._setup.objectives), cpu)

    def close(self) -> None:
        """Let go of idle connections."""
        self._client.close()

    def _cpu_s(self) -> dict[psutil.Process, float]:
        found = {}
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):  # one of Ray's idle workers
                found[process] = sum(process.cpu_times()[:2])
        return found


async def run(setup: Setup, loads: Sequence[float], seconds: float, folder: Path) -> None:
    """Everything, printed as it comes."""
    runs: dict[str, list[Run]] = {}
    requests_per_s = tokens_per_s = 0.0
    for mode in ("off", "enforce"):
        mix = Mix(seed=1, model=setup.model, prompt_words=setup.prompt_words)
        keys_file = folder / f"{mode}.yaml"
        keys_file.write_text(mix.keys_file())
        keys_file.chmod(0o600)
        with setup.target(setup.objectives.model_copy(update={"mode": mode}), keys_file) as target:
            bench = Bench(setup, mix, target)
            if mode == "off":
                requests_per_s, tokens_per_s = await bench.capacity()
                print(f"{setup.description}\ncapacity: {requests_per_s:.1f} requests/s, {tokens_per_s:.0f} tokens/s")
            runs[mode] = [await bench.load(factor * requests_per_s, seconds) for factor in loads]
            bench.close()
    for factor, enforced, off in zip(loads, runs["enforce"], runs["off"], strict=True):
        most = max(one.figures.goodput for one in runs["enforce"])
        print_load(f"{factor:g}x, {factor * requests_per_s:.0f} requests/s", enforced, off, most, setup.objectives)
    print_verdict([one.figures for one in runs["enforce"]], tokens_per_s, setup.objectives)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", choices=SETUPS, default="fake", help="what is overloaded")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 5, 10], help="multiples of the capacity")
    args = parser.parse_args()
    print(mixed(1).row())
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(SETUPS[args.replicas], args.loads, args.seconds, Path(folder)))


if __name__ == "__main__":
    main()
