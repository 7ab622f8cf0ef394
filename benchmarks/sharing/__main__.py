"""What attention replicas gain and lose by sharing two expert workers.

First table: 1, 2 and 4 clients, each in a process of its own with the real client, on the same two workers with the
real kernel and random experts. `row-layers/s`: rows times layers that came back, of all clients. `rows/GEMM`: how many
rows of one expert a worker computed together. Second table: five clients at five layers of 50 ms each, on a worker that
is idle when they come and on one that is busy, by turns and as it was before them (flat combining).

    python -m benchmarks.sharing
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sharing.client import Load
from benchmarks.sharing.five_layers import AnswerTimes, five_layers
from benchmarks.sharing.worker import Computed
from cluster.config import Config, ExpertsConfig, ModelConfig
from cluster.model.identity import model_identity
from cluster.model.spec import load_checkpoint_index, load_model_spec
from cluster.plan.shares import split_shares
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from tests.checkpoints import Shape, make_checkpoint

WORKERS = 2


@dataclass(frozen=True)
class Shared:
    """What came of some clients on the same workers."""

    clients: int
    row_layers_per_s: float
    dispatch_p50_ms: float
    dispatch_p99_ms: float
    queue_ms: float  # mean wait in a worker's queue
    compute_ms: float  # mean of a turn
    rows_per_gemm: float
    requests_per_turn: float
    busy: float  # share of the time in which a worker computed


@contextmanager
def _process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[str], ask: bool = False) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    line = process.stdout.readline().strip()
    assert line, f"a process ended with status {process.wait(10)}"
    return line


def share(checkpoint: Path, folder: Path, counts: Sequence[int], args: argparse.Namespace) -> list[Shared]:
    """The first table."""
    spec = load_model_spec(checkpoint)
    config = Config(model=ModelConfig(path=checkpoint), experts=ExpertsConfig(workers=WORKERS, threads=1))
    placement = PlacementFile(folder / "placement")
    identity = model_identity(spec, load_checkpoint_index(checkpoint))
    with ExitStack() as stack:
        held = [dict.fromkeys(spec.moe_layers, ids) for ids in split_shares(spec.num_experts, [1.0] * WORKERS, 1)]
        workers = [
            stack.enter_context(_process("benchmarks.sharing.worker", config.model_dump_json(), json.dumps(mine)))
            for mine in held
        ]
        endpoints = [WorkerEndpoint(f"w{i}", _line(process), held[i]) for i, process in enumerate(workers)]
        placement.write(PlacementTable.of(Stamp(1, 1), tuple(endpoints)))
        made = []
        for count in counts:
            loads = [
                Load(str(placement.path), identity, spec.hidden_size, spec.num_experts, spec.top_k, spec.moe_layers,
                     args.rows, args.pause_ms / 1e3, args.seconds, seed)
                for seed in range(count)
            ]  # fmt: skip
            made.append(_measure(workers, loads))
        return made


def _measure(workers: Sequence[subprocess.Popen[str]], loads: Sequence[Load]) -> Shared:
    with ExitStack() as stack:
        clients = [stack.enter_context(_process("benchmarks.sharing.client", load.to_json())) for load in loads]
        for client in clients:
            _line(client)
        for worker in workers:
            _line(worker, ask=True)  # what the warming up took
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("\n")
            client.stdin.flush()
        times_s = sorted(time_s for client in clients for time_s in json.loads(_line(client)))
        done = [Computed(**json.loads(_line(worker, ask=True))) for worker in workers]
    batches, seconds = sum(one.batches for one in done), loads[0].seconds
    requests = sum(one.requests for one in done)
    return Shared(
        clients=len(loads),
        row_layers_per_s=len(times_s) * loads[0].rows / seconds,
        dispatch_p50_ms=1e3 * statistics.median(times_s),
        dispatch_p99_ms=1e3 * times_s[int(0.99 * len(times_s))],
        queue_ms=1e3 * sum(one.queue_s for one in done) / requests,
        compute_ms=1e3 * sum(one.compute_s for one in done) / batches,
        rows_per_gemm=sum(one.gemm_rows for one in done) / max(1, sum(one.gemms for one in done)),
        requests_per_turn=requests / batches,
        busy=sum(one.compute_s for one in done) / seconds / len(workers),
    )


def _print(shared: Sequence[Shared], five: dict[str, AnswerTimes]) -> None:
    if shared:
        print("clients  row-layers/s  dispatch p50 ms     p99  queue ms  compute ms  rows/GEMM  requests/turn  busy")
    for one in shared:
        print(
            f"{one.clients:>7} {one.row_layers_per_s:>13.0f} {one.dispatch_p50_ms:>16.2f} {one.dispatch_p99_ms:>7.2f} "
            f"{one.queue_ms:>9.2f} {one.compute_ms:>11.2f} {one.rows_per_gemm:>10.2f} {one.requests_per_turn:>14.2f} "
            f"{one.busy:>5.2f}"
        )
    print("\nfive clients at five layers of 50 ms, answers in ms")
    for name, times in five.items():
        for way, answers_ms in (("before", times.former_ms), ("turns", times.turns_ms)):
            row = "  ".join(f"{answer:>4.0f}" for answer in answers_ms)
            print(f"{name} worker, {way:<6}  {row}   mean {statistics.fmean(answers_ms):.0f}")
        print(f"{name} worker, ratio of the means {times.ratio:.2f}")


def main() -> None:
    """Run both and print the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4], help="none: only the five clients")
    parser.add_argument("--rows", type=int, default=8, help="rows per dispatch: a decode batch")
    parser.add_argument("--pause-ms", type=float, default=2.0, help="a replica's own part of a layer, on other cores")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of clients")
    parser.add_argument("--rounds", type=int, default=10, help="of the five clients")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shared: list[Shared] = []
        if args.clients:
            shape = Shape(
                hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_layers=4,
                num_experts=args.experts, top_k=8,
            )  # fmt: skip
            checkpoint = make_checkpoint(Path(name) / "checkpoint", shape, dtype="bfloat16")
            shared = share(checkpoint, Path(name), args.clients, args)
    five = five_layers(args.rounds)
    if args.json:
        ratios = {key: asdict(times) | {"ratio": times.ratio} for key, times in five.items()}
        print(json.dumps({"shared": [asdict(one) for one in shared], "five_layers": ratios}, indent=2))
    else:
        _print(shared, five)


if __name__ == "__main__":
    main()
