"""Balancing against DeepSeek's EPLB (written anew from its description) at equal slots: quality, moves and time.

`mean/max` is the mean over layers of mean / max time of a device: 1 is perfect. `N-1` is the sum over layers of the
slowest device's time after the loss of the worst host, over that of a perfect division before it. Devices of different
speed are 3 : 1 in turn; EPLB takes them for alike. Times are the least of some runs, after one that does not count.

    python -m benchmarks.balance --json
    python -m benchmarks.balance --trace my_trace.npz      # recorded by benchmarks.balance.record
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.balance.eplb import eplb
from benchmarks.balance.scenarios import DEEPSEEK, Scenario, recorded, scenarios, shifted, skewed
from routing.tokens.balancing import BalanceOptions, Placement, WorkerCapacity, balance, place, score

EXPERT_BYTES = 3 * 7168 * 2048  # one of DeepSeek-V3's, FP8
OPTIONS = BalanceOptions(EXPERT_BYTES)
TRACE = Path(__file__).with_name("demo_trace.npz")
T = TypeVar("T")
_SPEEDS = {"1 : 1": (1.0,), "3 : 1": (3.0, 1.0)}


@dataclass(frozen=True)
class Quality:
    """One scenario with one kind of devices."""

    scenario: str
    devices: str
    speeds: str
    eplb: float  # mean/max
    ours: float
    eplb_max: float  # time of the slowest device, summed over layers
    ours_max: float
    eplb_loss: float  # N-1
    ours_loss: float
    eplb_ms: float
    ours_ms: float


@dataclass(frozen=True)
class Shift:
    """One shift of workload from a placement that was good, with one budget; the mean of several windows."""

    shift: str
    how: str
    moved: float  # experts loaded, of all slots
    moved_gib: float
    mean_max: float
    ms: float


@dataclass(frozen=True)
class Scale:
    """Times for DeepSeek-V3's layers and experts."""

    devices: int
    slots: int
    floor: int
    place_ms: float
    balance_ms: float
    moves: int


def main() -> None:
    """Print the tables, and with --json their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE, help="recorded loads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the tables on stderr")
    args = parser.parse_args()
    out = sys.stderr if args.json else sys.stdout
    trace_NLE = recorded(args.trace)
    print(f"{'scenario':30} {'devices':>8} {'speeds':>7} {'mean/max EPLB':>14} {'ours':>7} {'max EPLB':>10} "
          f"{'ours':>10} {'N-1 EPLB':>9} {'ours':>6} {'ms EPLB':>8} {'ours':>7}", file=out)  # fmt: skip
    quality = []
    for scenario in scenarios(trace_NLE):
        for speeds in _SPEEDS:
            row = measure(scenario, speeds, args.repeats)
            quality.append(row)
            print(f"{row.scenario:30} {row.devices:>8} {row.speeds:>7} {row.eplb:>14.4f} {row.ours:>7.4f} "
                  f"{row.eplb_max:>10.1f} {row.ours_max:>10.1f} {row.eplb_loss:>9.2f} {row.ours_loss:>6.2f} "
                  f"{row.eplb_ms:>8.1f} {row.ours_ms:>7.1f}", file=out, flush=True)  # fmt: skip
    print(f"\n{'shift':32} {'how':22} {'moved':>7} {'GiB':>8} {'mean/max':>9} {'ms':>7}", file=out)
    shifts = []
    for shift in measure_shifts(trace_NLE):
        shifts.append(shift)
        print(f"{shift.shift:32} {shift.how:22} {shift.moved:>7.1%} {shift.moved_gib:>8.1f} {shift.mean_max:>9.4f} "
              f"{shift.ms:>7.1f}", file=out, flush=True)  # fmt: skip
    print(f"\n{'devices x slots':>16} {'floor':>6} {'place, ms':>10} {'balance, ms':>12} {'moves':>6}", file=out)
    scale = []
    for at in measure_scale(args.repeats):
        scale.append(at)
        print(f"{at.devices:>11} x {at.slots:>2} {at.floor:>6} {at.place_ms:>10.1f} {at.balance_ms:>12.1f} "
              f"{at.moves:>6}", file=out, flush=True)  # fmt: skip
    if args.json:
        tables = {"quality": quality, "shifts": shifts, "scale": scale}
        print(json.dumps({name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}, indent=2))


def measure(scenario: Scenario, speeds: str, repeats: int) -> Quality:
    """Compare both on one scenario."""
    loads_LE, devices, slots = scenario.loads_LE, scenario.devices, scenario.slots
    workers = fleet(devices, slots, len(loads_LE), scenario.per_host, _SPEEDS[speeds])
    theirs, eplb_ms = timed(
        lambda: eplb(loads_LE, devices * slots, scenario.groups, scenario.nodes, devices), repeats
    )  # fmt: skip
    ours, ours_ms = timed(lambda: place(loads_LE, workers, OPTIONS), repeats)
    theirs_score = score(as_placement(theirs, loads_LE.shape[1], devices), loads_LE, workers, OPTIONS)
    ours_score = score(ours, loads_LE, workers, OPTIONS)
    ideal_s = loads_LE.sum() / sum(worker.rows_per_s for worker in workers)
    return Quality(
        scenario.name, f"{devices} x {slots}", speeds, theirs_score.balancedness, ours_score.balancedness,
        theirs_score.step_s, ours_score.step_s, theirs_score.loss_s / ideal_s, ours_score.loss_s / ideal_s, eplb_ms,
        ours_ms,
    )  # fmt: skip


def measure_shifts(trace_NLE: np.ndarray, layers: int = DEEPSEEK[0]) -> Iterator[Shift]:
    """Yield, for workloads that change, what a budget of moves wins; EPLB places anew, device by device as numbered."""
    before_LE = skewed(layers, DEEPSEEK[1], 0.45, seed=0)
    small_NLE = np.stack([before_LE, *(shifted(before_LE, seed) for seed in range(3))])
    large_NLE = np.stack([before_LE, *(shifted(before_LE, seed, 0.5, 0.3) for seed in range(3))])
    for name, loads_NLE, devices, slots in (
        ("10 % of experts change places", small_NLE, 40, 8), ("30 % of experts change places", large_NLE, 40, 8),
        ("recorded, window to window", trace_NLE, 8, 3),
    ):  # fmt: skip
        workers = fleet(devices, slots, loads_NLE.shape[1], 2, (1.0,))
        all_slots = devices * slots * loads_NLE.shape[1]
        pairs = [(loads_NLE[0] if loads_NLE is not trace_NLE else loads_NLE[at - 1], loads_NLE[at])
                 for at in range(1, len(loads_NLE))]  # fmt: skip
        yield _mean(name, "EPLB, anew", [_eplb_anew(*pair, devices, slots, workers) for pair in pairs], all_slots)
        starts = [place(before, workers, OPTIONS) for before, _ in pairs]
        for share in (0.0, 0.01, 0.03, 0.1, None):
            budget = None if share is None else int(share * all_slots) * EXPERT_BYTES
            options = dataclasses.replace(OPTIONS, budget_bytes=budget)
            found = []
            for start, (_, after) in zip(starts, pairs, strict=True):
                plan, ms = timed(lambda: balance(after, workers, start, options), 1)  # noqa: B023
                found.append((len(plan.moves), plan.after.balancedness, ms))
            how = "ours, no limit" if share is None else f"ours, {share:.0%} of slots"
            yield _mean(name, how if share != 0 else "ours, weights alone", found, all_slots)


def measure_scale(repeats: int) -> Iterator[Scale]:
    """Yield times for fleets of several sizes."""
    loads_LE = skewed(*DEEPSEEK, 0.45, seed=0)
    after_LE = shifted(loads_LE, seed=0)
    for devices, slots, floor in (
        (8, 40, 1), (16, 20, 1), (32, 10, 1), (40, 8, 1), (64, 5, 1), (64, 6, 1), (64, 10, 1), (64, 10, 2),
    ):  # fmt: skip
        workers = fleet(devices, slots, len(loads_LE), 4, (1.0,))
        options = dataclasses.replace(OPTIONS, replica_floor=floor)
        placement, place_ms = timed(lambda: place(loads_LE, workers, options), repeats)  # noqa: B023
        plan, balance_ms = timed(lambda: balance(after_LE, workers, placement, options), repeats)  # noqa: B023
        yield Scale(devices, slots, floor, place_ms, balance_ms, len(plan.moves))


def fleet(devices: int, slots: int, layers: int, per_host: int, speeds: Sequence[float]) -> list[WorkerCapacity]:
    """Workers with `slots` slots in every layer; `speeds` take turns."""
    return [
        WorkerCapacity(str(at), slots * layers * EXPERT_BYTES, speeds[at % len(speeds)], f"h{at // per_host}")
        for at in range(devices)
    ]


def as_placement(expert_LP: np.ndarray, experts: int, devices: int) -> Placement:
    """EPLB's replicas as a placement with even shares; two of one expert on one device become one."""
    layers, replicas = expert_LP.shape
    count_LEG = np.zeros((layers, experts, devices), dtype=np.int64)
    device_P = np.arange(replicas) // (replicas // devices)
    np.add.at(count_LEG, (np.arange(layers)[:, None], expert_LP, device_P), 1)
    order_LEG = np.argsort(-count_LEG, axis=2, kind="stable")
    sorted_LEG = np.take_along_axis(count_LEG, order_LEG, axis=2)
    most = int((sorted_LEG > 0).sum(axis=2).max())
    shares_LER = sorted_LEG[:, :, :most] / count_LEG.sum(axis=2, keepdims=True)
    workers_LER = np.where(shares_LER > 0, order_LEG[:, :, :most], -1)
    return Placement(workers_LER.astype(np.int16), shares_LER.astype(np.float32))


def timed(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """Return what `call` returns, and the least milliseconds of `repeats` calls after the first."""
    result, least = call(), float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - begun)
    return result, least * 1e3


def _eplb_anew(
    before_LE: np.ndarray, after_LE: np.ndarray, devices: int, slots: int, workers: Sequence[WorkerCapacity]
) -> tuple[int, float, float]:
    """Experts that devices must load that they did not hold, mean/max, and milliseconds."""
    old = as_placement(eplb(before_LE, devices * slots, 1, 1, devices), before_LE.shape[1], devices)
    found, ms = timed(lambda: eplb(after_LE, devices * slots, 1, 1, devices), 1)
    new = as_placement(found, before_LE.shape[1], devices)
    held = {tuple(at) for at in _held(old)}
    moved = sum(tuple(at) not in held for at in _held(new))
    return moved, score(new, after_LE, workers, OPTIONS).balancedness, ms


def _held(placement: Placement) -> list[list[int]]:
    layer_N, expert_N, at_N = np.nonzero(placement.workers_LER >= 0)
    worker_N = placement.workers_LER[layer_N, expert_N, at_N]
    return np.stack([layer_N, expert_N, worker_N], axis=1).tolist()


def _mean(shift: str, how: str, found: Sequence[tuple[int, float, float]], all_slots: int) -> Shift:
    moved, mean_max, ms = np.mean(found, axis=0)
    return Shift(shift, how, moved / all_slots, moved * EXPERT_BYTES / 2**30, float(mean_max), float(ms))


if __name__ == "__main__":
    main()
