"""Replica choice against round robin and Ray Serve's power of two choices, over simulated replicas.

    python -m benchmarks.replica_choice [--weights]

Loads: `shared` (one of 256 prefixes of 2,048 tokens, by Zipf's law, and a tail of the request's own), `hot` (one prefix
for all), `random` (nothing in common), `mixed` (random prompts of 64 to 8,192 tokens). Times at a rate that each policy
can hold (open loop, Poisson); throughput with three quarters of the decode slots in use, and with all (closed loop),
where the only replica with a free slot gets the request and nothing is left to choose. `--weights` tries other weights
of the score.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.fakes.service_model import ServiceModel
from benchmarks.fakes.tokens import BYTES_PER_TOKEN
from benchmarks.replica_choice.simulation import (
    Ours,
    Outcome,
    Policy,
    PowerOfTwo,
    ReplicaSimulation,
    Request,
    RoundRobin,
    make_request,
)
from routing.requests.replica_choice import KV_TOKENS, SLOTS_TOKENS, ReplicaChoice

# A mid-size model on one GPU: 15 ms steps, 8,000 tokens/s of prefill. A fifth of the 256 prefixes fits into one cache.
MODEL = ServiceModel(slots=32, kv_cache_tokens=98_304, base_s=0.015, sequence_s=0.0005, prefill_tokens_per_s=8_000)
REPLICAS = 4
PREFIXES = 256
PREFIX_TOKENS = 2048
MEAN_NEW_TOKENS = 128
REQUESTS = 2000
_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Load:
    """Prompts, and how many requests arrive per second in the open loop."""

    name: str
    prompt: Callable[[random.Random], bytes]
    per_s: float


def _random_text(rng: random.Random, tokens: int) -> bytes:
    return rng.randbytes(tokens * BYTES_PER_TOKEN)


_PREFIX = [_random_text(random.Random(f"prefix {number}"), PREFIX_TOKENS) for number in range(PREFIXES)]
_ZIPF = [1 / (rank + 1) for rank in range(PREFIXES)]


def _shared(rng: random.Random) -> bytes:
    return rng.choices(_PREFIX, _ZIPF)[0] + _random_text(rng, rng.randint(32, 256))


def _hot(rng: random.Random) -> bytes:
    return _PREFIX[0] + _random_text(rng, rng.randint(32, 256))


def _alone(rng: random.Random) -> bytes:
    return _random_text(rng, rng.randint(256, 1536))


def _mixed(rng: random.Random) -> bytes:
    return _random_text(rng, int(2 ** rng.uniform(6, 13)))


LOADS = (
    Load("shared", _shared, 13.0),
    Load("hot", _hot, 20.0),
    Load("random", _alone, 14.0),
    Load("mixed", _mixed, 9.0),
)


def requests(load: Load, seed: int) -> list[Request]:
    """The load's arrivals."""
    rng, now_s, made = random.Random(f"{load.name} {seed}"), 0.0, []
    for number in range(REQUESTS):
        now_s += rng.expovariate(load.per_s)
        made.append(make_request(number, load.prompt(rng), 1 + int(rng.expovariate(1 / MEAN_NEW_TOKENS)), now_s))
    return made


@dataclass
class Outcomes:
    """One policy's runs, one of each kind per seed."""

    opened: list[Outcome] = field(default_factory=list)
    partly: list[Outcome] = field(default_factory=list)  # closed loop, three quarters of the slots
    full: list[Outcome] = field(default_factory=list)  # closed loop, all slots


def run(load: Load, policies: Sequence[Callable[[int], Policy]]) -> list[Outcomes]:
    """Every policy over the same requests."""
    found = [Outcomes() for _ in policies]
    slots = REPLICAS * MODEL.slots
    for seed in _SEEDS:
        asked = requests(load, seed)
        for outcomes, policy in zip(found, policies, strict=True):
            # A simulation writes arrival times into its requests, so the open loop comes first.
            fresh = [Request(one.ask, one.blocks, one.arrived_s) for one in asked]
            outcomes.opened.append(ReplicaSimulation(policy(seed), MODEL, REPLICAS).open_loop(fresh))
            outcomes.partly.append(ReplicaSimulation(policy(seed), MODEL, REPLICAS).closed_loop(fresh, slots * 3 // 4))
            outcomes.full.append(ReplicaSimulation(policy(seed), MODEL, REPLICAS).closed_loop(fresh, slots))
    return found


def _quantile(outcomes: Sequence[Outcome], fraction: float) -> float:
    values = sorted(value for outcome in outcomes for value in outcome.ttft_s)
    return values[min(len(values) - 1, int(fraction * len(values)))]


def _row(name: str, outcomes: Outcomes) -> list[float]:
    hits = statistics.fmean(one.hit_ratio for one in outcomes.opened)
    tpot_ms = 1e3 * statistics.fmean(value for one in outcomes.opened for value in one.tpot_s)
    partly, full = (statistics.fmean(one.tokens_per_s for one in kind) for kind in (outcomes.partly, outcomes.full))
    p50_ms, p99_ms = (1e3 * _quantile(outcomes.opened, fraction) for fraction in (0.5, 0.99))
    print(f"  {name:28}{p50_ms:>10.0f}{p99_ms:>10.0f}{tpot_ms:>10.1f}{hits:>8.1%}{partly:>12.0f}{full:>12.0f}")
    return [p50_ms, p99_ms, tpot_ms, hits, partly, full]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="store_true", help="try other weights of the score")
    weights = parser.parse_args().weights
    policies: list[tuple[str, Callable[[int], Policy]]] = [
        ("round robin", lambda seed: RoundRobin()),
        ("power of two choices", lambda seed: PowerOfTwo(random.Random(seed))),
        (f"ours (slots {SLOTS_TOKENS:g}, kv {KV_TOKENS:g})", lambda seed: Ours(ReplicaChoice())),
    ]
    if weights:
        policies += [
            (f"slots {slots:g}, kv {kv:g}", lambda seed, slots=slots, kv=kv: Ours(ReplicaChoice(slots, kv)))  # type: ignore[misc]
            for slots in (0.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0)
            for kv in (0.0, 512.0, 2048.0)
        ]
    print(f"{REPLICAS} replicas, {MODEL}\n{REQUESTS} requests a run, {len(_SEEDS)} seeds")
    for load in LOADS:
        print(f"\n{load.name}, {load.per_s:g} requests/s")
        print(f"  {'':28}{'TTFT p50':>10}{'p99 ms':>10}{'TPOT ms':>10}{'hits':>8}{'tokens/s 3/4':>15}{'all':>9}")
        found = run(load, [policy for _, policy in policies])
        rows = [_row(name, outcome) for (name, _), outcome in zip(policies, found, strict=True)]
        ours = rows[2]
        for (name, _), theirs in zip(policies[:2], rows[:2], strict=True):
            ratio = [own / other if other else 1.0 for own, other in zip(ours, theirs, strict=True)]
            print(
                f"  ours / {name:21}{ratio[0]:>9.2f}x{ratio[1]:>9.2f}x{ratio[2]:>9.2f}x{'':8}{ratio[4]:>11.2f}x"
                f"{ratio[5]:>11.2f}x"
            )


if __name__ == "__main__":
    main()
