"""What a dispatch costs the engine's thread, by workers, experts and rows: CPU time and bytes, without the network.

The client is the real one; in place of gRPC stands a link that answers at once from memory, so that what is measured is
our own Python: split, pack, bookkeeping, decode and sum. A sweep changes one of the three sizes and keeps the others.
Rows choose experts uniformly, without groups: the most workers per row that there can be.

`python -m benchmarks.client_scale --help`
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from benchmarks.client_scale_chart import write_chart
from cluster.config import DispatchConfig
from monitoring.dispatch_meter import DispatchMeter
from monitoring.metrics import DispatchMetrics
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.link import WorkerLink
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.routed_tokens import RoutedTokensCounter
from routing.tokens.wire import DispatchReply, decode_reply, encode_reply, peek_frame_id

LAYERS = 58  # MoE layers of DeepSeek-V3, for the cost of a step
_REPLY_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """One point: the engine thread's CPU time and the bytes of one dispatch of one layer."""

    sweep: str
    workers: int
    experts: int
    rows: int
    hidden: int
    dtype: str
    cpu_us: float
    wall_us: float
    bytes_out: int
    bytes_in: int

    @property
    def cpu_us_per_row(self) -> float:
        """Per token and layer."""
        return self.cpu_us / self.rows

    @property
    def step_ms(self) -> float:
        """CPU time of a step of DeepSeek-V3's MoE layers."""
        return self.cpu_us * LAYERS / 1e3


class MemoryLink(WorkerLink):
    """Answers each frame at once, with ones; encodes a reply of each length once."""

    def __init__(
        self, address: str, model_id: str, settings: DispatchConfig, channels: object = None, poller: object = None
    ) -> None:
        self.address = address
        self._hidden = int(model_id)
        self._rows: dict[int, int] = {}
        self._frames: dict[int, bytes] = {}
        self.bytes_out = self.bytes_in = 0

    @property
    def idle(self) -> bool:
        """Whether nobody waits for a reply."""
        return not self._rows

    def send(self, frame: bytes) -> None:
        """Take a frame in."""
        self._rows[peek_frame_id(frame)] = int.from_bytes(frame[24:28], "little")  # docs/wire-format.md
        self.bytes_out += len(frame)

    def receive(self, frame_id: int, timeout_s: float, give_up: bool = True) -> DispatchReply:
        """Return as many rows as the frame had."""
        rows = self._rows.pop(frame_id)
        frame = self._frames.get(rows)
        if frame is None:
            ones = torch.ones(rows, self._hidden, dtype=_REPLY_DTYPE)
            frame = self._frames[rows] = encode_reply(DispatchReply(frame_id, 1, 0, 10, 20, ones))
        self.bytes_in += len(frame)
        reply = decode_reply(frame)
        assert isinstance(reply, DispatchReply)
        return reply

    def forget(self, frame_id: int) -> None:
        """Drop a frame."""
        self._rows.pop(frame_id, None)

    def tend(self, now: float) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def _client(
    workers: int, experts: int, hidden: int, dtype: torch.dtype
) -> Iterator[tuple[ExpertClient, list[MemoryLink]]]:
    links: list[MemoryLink] = []

    class Counted(MemoryLink):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            links.append(self)

    with tempfile.TemporaryDirectory() as folder:
        held = [tuple(range(at * experts // workers, (at + 1) * experts // workers)) for at in range(workers)]
        placement = PlacementFile(Path(folder) / "placement")
        placement.write(
            PlacementTable.of(
                Stamp(1, 1), tuple(WorkerEndpoint(f"w{at}", f"w{at}:1", {0: ids}) for at, ids in enumerate(held))
            )
        )
        meter = DispatchMeter(DispatchMetrics(CollectorRegistry()))
        shape = ExpertShape(str(hidden), hidden, experts)
        client = ExpertClient(
            DispatchConfig(), shape, placement, dtype, _REPLY_DTYPE, meter=meter, counter=RoutedTokensCounter(experts),
            link_class=Counted,
        )  # fmt: skip
        try:
            yield client, links
        finally:
            client.close()


def measure(
    sweep: str, workers: int, experts: int, rows: int, hidden: int, top_k: int, dtype: torch.dtype, budget_s: float
) -> Measured:
    """Repeat one dispatch for `budget_s`; the median of the thread's CPU time and of the time that passed."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(rows, hidden, generator=generator).to(torch.bfloat16)
    ids_TK = torch.rand(rows, experts, generator=generator).topk(top_k, dim=1).indices.to(torch.int32)
    weights_TK = torch.rand(rows, top_k, generator=generator)
    with _client(workers, experts, hidden, dtype) as (client, links):
        for _ in range(10):
            client.forward(0, hidden_TH, ids_TK, weights_TK)
        for link in links:
            link.bytes_out = link.bytes_in = 0
        cpu_s, wall_s = [], []
        end = time.perf_counter() + budget_s
        while time.perf_counter() < end or len(cpu_s) < 20:
            cpu, wall = time.thread_time(), time.perf_counter()
            client.forward(0, hidden_TH, ids_TK, weights_TK)
            wall_s.append(time.perf_counter() - wall)
            cpu_s.append(time.thread_time() - cpu)
        count = len(cpu_s)
        return Measured(
            sweep, workers, experts, rows, hidden, str(dtype).removeprefix("torch."),
            1e6 * statistics.median(cpu_s), 1e6 * statistics.median(wall_s),
            sum(link.bytes_out for link in links) // count, sum(link.bytes_in for link in links) // count,
        )  # fmt: skip


def slope(points: Sequence[Measured]) -> float:
    """CPU microseconds per worker: least squares over a sweep of workers."""
    workers, cpu_us = [point.workers for point in points], [point.cpu_us for point in points]
    return statistics.linear_regression(workers, cpu_us).slope


def growth(points: Sequence[Measured]) -> float:
    """The largest factor by which the cost per row grows between neighbours of a sweep of rows; 1 is linear."""
    pairs = itertools.pairwise(points)
    return max(after.cpu_us_per_row / before.cpu_us_per_row for before, after in pairs)


def main() -> None:
    """Exit status 1 when the cost grows faster than linearly in rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of hidden states on the wire, such as float8_e4m3fn")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 512])
    parser.add_argument("--at", type=int, nargs=3, default=[64, 256, 64], metavar=("WORKERS", "EXPERTS", "ROWS"),
                        help="the sizes that a sweep keeps")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.7, help="per point")
    parser.add_argument("--json", action="store_true", help="the points as JSON, and no table")
    parser.add_argument("--chart", type=Path, help="write the sweeps of workers and rows to this SVG file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    workers, experts, rows = args.at
    sizes = [("workers", each, experts, rows) for each in args.workers]
    sizes += [("experts", min(workers, each), each, rows) for each in args.experts]
    sizes += [("rows", workers, experts, each) for each in args.rows]
    points = [measure(*size, args.hidden, args.top_k, dtype, args.seconds) for size in sizes]
    by_sweep = {sweep: [point for point in points if point.sweep == sweep] for sweep, *_ in sizes}
    per_worker_us, most_growth = slope(by_sweep["workers"]), growth(by_sweep["rows"])
    if args.json:
        print(json.dumps({
            "points": [asdict(point) for point in points],
            "us_per_worker": per_worker_us, "growth_in_rows": most_growth,
        }))  # fmt: skip
    else:
        _print_table(points)
        print(f"each further worker: {per_worker_us:.1f} us per layer")
        print(f"cost per row grows by at most {most_growth:.2f}x")
    if args.chart:
        write_chart(
            args.chart,
            f"Engine thread per layer, hidden {args.hidden}, {args.dtype}, top-{args.top_k}, network left out",
            [
                (f"workers ({rows} rows)", [(point.workers, point.cpu_us) for point in by_sweep["workers"]]),
                (f"rows ({workers} workers)", [(point.rows, point.cpu_us) for point in by_sweep["rows"]]),
            ],
        )
    if most_growth > 1.25:  # what noise leaves of 1
        raise SystemExit(1)


def _print_table(points: Sequence[Measured]) -> None:
    print("sweep    workers  experts   rows  CPU us/layer  us/row  58 layers ms  KiB out/row  KiB in/row")
    for p in points:
        print(
            f"{p.sweep:<8} {p.workers:>7} {p.experts:>8} {p.rows:>6} {p.cpu_us:>13.0f} {p.cpu_us_per_row:>7.1f} "
            f"{p.step_ms:>13.1f} {p.bytes_out / p.rows / 1024:>12.1f} {p.bytes_in / p.rows / 1024:>11.1f}"
        )


if __name__ == "__main__":
    main()
