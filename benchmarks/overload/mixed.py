"""A tenant that asks for 60 sequences at once beside one that asks for one: what the other waits, and what stands idle.

In virtual time, on replicas of a stated service model. The wide requests alone are nearly twice what the replicas can
do. A request needs its slots on one replica: with one of 60 on each of seven replicas of 64 slots, and the others
in what is left, about 3 % of the slots cannot be used by anybody.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge

from benchmarks.fakes.service_model import ServiceModel
from benchmarks.overload.report import quantile
from benchmarks.overload.simulation import Call, Simulation
from cluster.config import ClassObjective
from routing.requests.request import Ask, Priority, Tenant

SERVICE = ServiceModel(
    slots=64, kv_cache_tokens=65_536, base_s=0.025, sequence_s=0.0002, prefill_tokens_per_s=40_000
)  # fmt: skip
REPLICAS = 8
WIDE, NARROW = Tenant("wide"), Tenant("narrow")
WIDE_SEQUENCES, WIDE_PER_S, NARROW_PER_S = 60, 8.0, 50.0
OBJECTIVES = {
    "system": ClassObjective(ttft_s=10.0, tpot_s=1.0),
    "interactive": ClassObjective(ttft_s=5.0, tpot_s=0.5),
    "batch": ClassObjective(ttft_s=60.0, tpot_s=2.0),
}
WARM_S, END_S = 10.0, 60.0


@dataclass(frozen=True)
class Mixed:
    """From WARM_S on."""

    narrow_wait_s: tuple[float, float]  # p50, p99, refused ones included
    narrow_refused: float  # part of them
    wide_refused: float
    idle: float  # part of all slots that no request held while anyone waited

    def row(self) -> str:
        """For people."""
        p50, p99 = self.narrow_wait_s
        setting = f"n={WIDE_SEQUENCES} beside n=1 ({REPLICAS} x {SERVICE.slots} slots, virtual time)"
        narrow = f"n=1 waits p50 {p50:.3f} s, p99 {p99:.2f} s, {self.narrow_refused:.1%} refused"
        wide = f"n={WIDE_SEQUENCES} {self.wide_refused:.0%} refused"
        return f"{setting}: {narrow}; {wide}; slots idle while anyone waits {self.idle:.1%}"


def mixed(seed: int) -> Mixed:
    """One run."""
    simulation = Simulation(SERVICE, REPLICAS, OBJECTIVES, seed)
    simulation.watch_s = WARM_S
    wide = _arrivals(WIDE, WIDE_SEQUENCES, WIDE_PER_S, random.Random(seed))
    narrow = _arrivals(NARROW, 1, NARROW_PER_S, random.Random(seed + 1))
    simulation.run(merge(wide, narrow, key=lambda call: call.due_s), END_S)
    calls = [one for one in simulation.calls.values() if one.due_s >= WARM_S]
    of_narrow = [one for one in calls if one.ask.tenant is NARROW]
    waits = [one.wait_s(END_S) for one in of_narrow]
    return Mixed(
        (quantile(waits, 0.5), quantile(waits, 0.99)),
        _refused(of_narrow),
        _refused([one for one in calls if one.ask.tenant is WIDE]),
        simulation.idle_share(),
    )


def _arrivals(tenant: Tenant, sequences: int, per_s: float, rng: random.Random) -> Iterator[Call]:
    at_s, number = 0.0, 0
    while True:
        at_s, number = at_s + rng.expovariate(per_s), number + 1
        prompt_tokens, tokens = rng.randint(20, 80), rng.randint(16, 64)
        ticket = f"{tenant.name} {number}"
        most = tokens * sequences
        ask = Ask(ticket, tenant, Priority.INTERACTIVE, prompt_tokens, most, sequences, (), None)
        yield Call(ask, at_s, tokens)


def _refused(calls: list[Call]) -> float:
    return sum(one.refused_s is not None for one in calls) / len(calls)
