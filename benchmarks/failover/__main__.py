"""Processes of the demo model killed, stopped, cut off or slowed while clients stream: failed requests, other tokens,
gaps.

The whole product, started as `deepsplit up` starts it, in float32, where tokens can be compared. A gap is the longest
time that a stream got no token, from the fault until the cluster is whole again; beside it the 99th percentile of the
times between two tokens meanwhile, over that of the seconds before. Faults: an expert worker is killed (`kill`),
stopped (`stop`), or runs for 1 ms of each 20 for a while (`slow`); packets to and from its port vanish for a while, so
that its connections are half open while its heartbeats go on (`cut`, needs root and iptables); its kernels fail
(`fail`) or never return (`hang`); the directory is killed (`directory`), and a worker with it (`both`); a worker gets a
third of its time, and experts move (`rebalance`); two workers more are added and go again (`scale`); all workers are
replaced, one after the other (`restart`). `python -m benchmarks.failover --help`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.failover.faults import FAULTS, environment, impossible
from benchmarks.failover.streams import MODEL, Streams, now_s
from benchmarks.measuring.application import Application

_DEMO = Path(__file__).parents[2] / "models" / "demo"
_CALM_S = 2.0  # before each fault
_WHOLE_S = 90.0  # the longest wait for the replacement of a worker


@dataclass(frozen=True)
class Outcome:
    """One fault, several times under one load."""

    fault: str
    replicas_per_expert: int
    times: int
    requests: int
    failed: Mapping[str, int]
    gaps_s: list[float]  # sorted, of all streams that were open
    whole_s: list[float]  # sorted: until every worker was there again
    between_tokens: float  # 99th percentile of the times between tokens meanwhile, over that of the seconds before


async def strike(app: Application, fault: str, times: int, workers: int, replicas: int, clients: int) -> Outcome:
    """Do it `times` times, each at a random moment with all workers there."""
    gaps: list[float] = []
    whole: list[float] = []
    async with Streams(app.status()["gateway"]["rest"], clients) as streams:
        moments = []
        for _ in range(times):
            await asyncio.sleep(2 + 2 * random.random())
            victim = random.choice(await asyncio.to_thread(app.ready))
            calm_s = now_s()
            await asyncio.sleep(_CALM_S)
            struck_s = now_s()
            await asyncio.to_thread(FAULTS[fault].happen, app, victim)
            gone = {victim["id"]} if FAULTS[fault].replaces else set()
            while now_s() - struck_s < _WHOLE_S:
                await asyncio.sleep(0.5)
                ready = {worker["id"] for worker in await asyncio.to_thread(app.ready)}
                if len(ready) == workers and not ready & gone:
                    break
            if fault == "stop":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim["pid"], signal.SIGKILL)
            whole.append(now_s() - struck_s)
            moments.append((calm_s, struck_s, now_s()))
    calm, meanwhile = list[float](), list[float]()
    for calm_s, struck_s, whole_s in moments:
        gaps += streams.longest_gaps(struck_s, whole_s)
        calm += streams.between_tokens(calm_s, struck_s)
        meanwhile += streams.between_tokens(struck_s, whole_s)
    between_tokens = float(np.percentile(meanwhile, 99) / np.percentile(calm, 99))
    tally = streams.tally
    requests = tally.answered + tally.failed.total()
    return Outcome(fault, replicas, times, requests, dict(tally.failed), sorted(gaps), sorted(whole), between_tokens)


def _config(workers: int, replicas: int) -> dict[str, Any]:
    return {
        "model": {"path": str(_DEMO), "name": MODEL, "dtype": "float32"},
        "attention": {"kv_cache_gib": 0.25, "max_model_len": 1024},
        "experts": {"workers": workers, "replicas_per_expert": replicas,
                    "rebalance": {"interval_s": 5}},
        "ray": {"num_cpus": workers + 10},
    }


def report(one: Outcome) -> None:
    """Print one line of the table."""
    def at(values: list[float], part: float) -> float:
        return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")

    print(f"{one.fault:<10}{one.replicas_per_expert:>9}{one.times:>7}{one.requests:>10}{sum(one.failed.values()):>8}"
          f"{len(one.gaps_s):>9}{at(one.gaps_s, 0.5):>9.2f}{at(one.gaps_s, 0.99):>8.2f}{at(one.gaps_s, 1):>8.2f}"
          f"{at(one.whole_s, 0.5):>9.1f}{one.between_tokens:>12.2f}  "
          f"{'; '.join(f'{why}: {count}' for why, count in one.failed.items())}", flush=True)  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="times that each fault happens")
    parser.add_argument("--clients", type=int, default=4, help="streams at once")
    parser.add_argument("--workers", type=int, default=2, help="expert workers")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="experts.replicas_per_expert")
    parser.add_argument("--fault", choices=FAULTS, nargs="+", default=list(FAULTS), help="only these")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a request failed or had other tokens")
    parser.add_argument("--json", action="store_true", help="every value, as JSON")
    args = parser.parse_args()
    for fault, why in impossible().items():
        if fault in args.fault:
            print(f"without `{fault}`: {why}", file=sys.stderr)
            args.fault.remove(fault)
    outcomes = []
    if not args.json:
        print(f"{'fault':<10}{'replicas':>9}{'times':>7}{'requests':>10}{'failed':>8}{'streams':>9}{'gap p50':>9}"
              f"{'p99':>8}{'max, s':>8}{'whole, s':>9}{'tokens p99':>12}  what clients saw", flush=True)  # fmt: skip
    for replicas in args.replicas:
        with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as folder:
            faults = Path(folder) / "faults"
            faults.mkdir()
            with Application(Path(folder), _config(args.workers, replicas), environment(faults)) as app:
                for fault in args.fault:
                    one = asyncio.run(strike(app, fault, args.times, args.workers, replicas, args.clients))
                    outcomes.append(one)
                    if not args.json:
                        report(one)
            time.sleep(1)
    if args.json:
        print(json.dumps([asdict(one) for one in outcomes]))
    if args.check and any(one.failed for one in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
