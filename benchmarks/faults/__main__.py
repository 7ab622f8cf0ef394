"""Processes killed under load: which requests fail, and why. No engine: real gateways over fake replicas.

Every client checks its tokens against the fake's own, so a stream that goes on elsewhere with one token too few or
too many counts as failed. `python -m benchmarks.faults --help`
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.fakes.service_model import ServiceModel
from benchmarks.faults.cluster import FaultCluster
from benchmarks.faults.load import FaultLoad, RequestShape, Tally

_ROOM = {"slots": 64, "kv_cache_tokens": 2**18}
# A tenth of a second of prefill for each prompt, and one token: every request is hit before its first token.
PREFILLING = ServiceModel(**_ROOM, base_s=0.01, sequence_s=0.0, prefill_tokens_per_s=640)
# Prefill is over at once: almost every request is hit in the middle of its stream.
STREAMING = ServiceModel(**_ROOM, base_s=0.01, sequence_s=0.0, prefill_tokens_per_s=1e5)


class Fault(Enum):
    """What happens; how a request can be struck by it."""

    ATTENTION_KILLED_EARLY = "attention replica killed, before first tokens"
    ATTENTION_KILLED = "attention replica killed, in streams"
    ATTENTION_HUNG = "attention replica stopped (SIGSTOP), in streams"
    GATEWAY_KILLED = "gateway killed"
    GATEWAY_DRAINED = "gateway stopped (SIGTERM)"
    ADMISSION_KILLED = "common admission killed"


@dataclass(frozen=True)
class FaultOutcome:
    """One fault, several times under one load."""

    fault: Fault
    times: int
    struck: int  # requests that were with the killed process
    begun: int  # gateways: those of them of which the client had read something; replicas: of all requests in flight
    in_flight: int  # at all processes
    tally: Tally
    explained: int  # failed requests whose own connection ended with the gateway that was killed


async def strike(fault: Fault, times: int, clients: int, pause_s: float = 0.7) -> FaultOutcome:
    """Do it `times` times, each after a while of calm with everything replaced, under `clients` streams."""
    early = fault is Fault.ATTENTION_KILLED_EARLY
    prompt_bytes, tokens = (256, 1) if early else (64, 100)
    shape = RequestShape("fake", prompt_bytes, tokens)
    struck = begun = in_flight = 0
    ended: list[tuple[int, float]] = []
    cluster = await asyncio.to_thread(FaultCluster, PREFILLING if early else STREAMING)
    try:
        async with FaultLoad(cluster.urls, shape, clients) as load:
            for _ in range(times):
                await asyncio.sleep(pause_s * (1 + random.random()))
                in_flight += len(load.in_flight)
                if fault in (Fault.GATEWAY_KILLED, Fault.GATEWAY_DRAINED):
                    victim = random.randrange(len(cluster.urls))
                    hit = [flight for flight in load.in_flight if flight.gateway == victim]
                    struck, begun = struck + len(hit), begun + sum(flight.begun for flight in hit)
                    ended.append((victim, time.monotonic()))
                    how = cluster.kill_gateway if fault is Fault.GATEWAY_KILLED else cluster.drain_gateway
                    await asyncio.to_thread(how, victim)
                    await asyncio.to_thread(cluster.start_gateway, victim)
                elif fault is Fault.ADMISSION_KILLED:
                    struck += len(load.in_flight)
                    await asyncio.to_thread(cluster.replace_admission)
                else:
                    begun += sum(flight.begun for flight in load.in_flight)
                    how_dies = signal.SIGSTOP if fault is Fault.ATTENTION_HUNG else signal.SIGKILL
                    struck += await asyncio.to_thread(cluster.replace_replica, how_dies)
    finally:
        await asyncio.to_thread(cluster.close)
    explained = sum(
        any(gateway == victim and at_s < failed_s < at_s + 1 for victim, at_s in ended)
        for gateway, failed_s in load.tally.failed_at
    )
    return FaultOutcome(fault, times, struck, begun, in_flight, load.tally, explained)


def report(outcomes: Sequence[FaultOutcome]) -> None:
    """The table. `begun`: fraction of the requests at hand of which the client had read something."""
    print(f"{'fault':48}{'times':>6}{'requests':>9}{'struck':>8}{'failed':>8}{'begun':>7}  what clients saw")
    for one in outcomes:
        of = one.struck if one.fault in (Fault.GATEWAY_KILLED, Fault.GATEWAY_DRAINED) else one.in_flight
        failed, requests = one.tally.failed.total(), one.tally.answered + one.tally.failed.total()
        seen = [f"sent again, {why}: {count}" for why, count in one.tally.again.items()]
        seen += [f"{why}: {count}" for why, count in one.tally.failed.items()]
        numbers = f"{one.times:>6}{requests:>9}{one.struck:>8}{failed:>8}{f'{one.begun / of:.0%}' if of else '-':>7}"
        print(f"{one.fault.value:48}{numbers}  {'; '.join(seen)}", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="times that each fault happens")
    parser.add_argument("--clients", type=int, default=12, help="streams at once")
    parser.add_argument("--fault", choices=[fault.name.lower() for fault in Fault], action="append", help="only these")
    args = parser.parse_args()
    outcomes = []
    for fault in Fault:
        if args.fault is None or fault.name.lower() in args.fault:
            outcomes.append(asyncio.run(strike(fault, args.times, args.clients)))
            report(outcomes[-1:])
    print()
    report(outcomes)


if __name__ == "__main__":
    main()
