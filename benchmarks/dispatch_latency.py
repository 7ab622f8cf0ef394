"""What a dispatch costs beyond the wire: our client and servers against bare gRPC echoes and bare TCP sockets.

All three move the same bytes between this process and as many others on loopback, in turn, in one run, so the ratios
hold on a noisy machine. The echoes are grpcio's synchronous streams with our channel options, one per worker, all sent
to before the first is read. Expert compute is the identity. `python -m benchmarks.dispatch_latency --help`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import torch

from cluster.config import DispatchConfig
from routing.tokens.channel import channel_options
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.server import ExpertServer

import grpc  # isort: skip  # after routing, which sets gRPC's endpoint experiments

HIDDEN = 4096  # 8 KiB per row in bfloat16
TOP_K = 8
SETTINGS = DispatchConfig()
TARGET_P50, TARGET_P99 = 1.25, 2.0  # of the echo
_PUBLISHED_MS = {8: 1.93, 1024: 8.0}  # KiB -> Expert-Kit's round trip, as published
_WARM_UP = 20


@dataclass(frozen=True)
class Row:
    """One size and number of workers, in microseconds."""

    workers: int
    kib: int  # each way and worker
    dispatch_p50: float
    dispatch_p99: float
    echo_p50: float
    echo_p99: float
    tcp_p50: float

    @property
    def ratios(self) -> tuple[float, float]:
        """Dispatch over echo, p50 and p99."""
        return self.dispatch_p50 / self.echo_p50, self.dispatch_p99 / self.echo_p99


def serve_dispatch(pipe: Connection) -> None:
    """Our server with identity experts."""
    torch.set_num_threads(1)
    server = ExpertServer(lambda layer, hidden_TH, ids_TK, weights_TK: hidden_TH, HIDDEN, "bench", SETTINGS)
    pipe.send(server.start("127.0.0.1"))
    pipe.recv()


def serve_echo(pipe: Connection) -> None:
    """A gRPC stream that sends every message back."""
    server = grpc.server(ThreadPoolExecutor(2), options=channel_options(SETTINGS))
    handler = grpc.stream_stream_rpc_method_handler(lambda frames, context: frames)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(f"127.0.0.1:{port}")
    pipe.recv()


def serve_tcp(pipe: Connection) -> None:
    """A socket that sends every byte back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(f"127.0.0.1:{listener.getsockname()[1]}")
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(1 << 20):
            peer.sendall(data)


def main() -> None:
    """Print the table, and with --json its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 64, 1024, 4096], help="each way and worker")
    parser.add_argument("--rounds", type=int, default=400, help="dispatches per way; a tenth of them from 1 MiB on")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the table on stderr")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = sys.stderr if args.json else sys.stdout
    print(f"{'workers':>7} {'KiB':>5} {'dispatch p50':>13} {'p99':>7} {'echo p50':>9} {'p99':>7} {'TCP p50':>8} "
          f"{'ratio p50':>10} {'p99':>6}   (us; targets {TARGET_P50}, {TARGET_P99})", file=out)  # fmt: skip
    rows = []
    for workers in args.workers:
        for row in _measure(workers, args):
            rows.append(row)
            p50, p99 = row.ratios
            published = f"   Expert-Kit published {_PUBLISHED_MS[row.kib]} ms" if row.kib in _PUBLISHED_MS else ""
            print(f"{workers:>7} {row.kib:>5} {row.dispatch_p50:>13.0f} {row.dispatch_p99:>7.0f} {row.echo_p50:>9.0f} "
                  f"{row.echo_p99:>7.0f} {row.tcp_p50:>8.0f} {p50:>10.2f} {p99:>6.2f}"
                  f"{'' if p50 <= TARGET_P50 and p99 <= TARGET_P99 else '   MISSED'}{published}",
                  file=out, flush=True)  # fmt: skip
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


def _measure(workers: int, args: argparse.Namespace) -> Iterator[Row]:
    with ExitStack() as stack:
        dispatch_at, echo_at, tcp_at = (
            [stack.enter_context(_process(serve)) for _ in range(workers)]
            for serve in (serve_dispatch, serve_echo, serve_tcp)
        )
        dispatch = stack.enter_context(_dispatch(dispatch_at))
        echo = stack.enter_context(_echo(echo_at))
        tcp = _tcp(tcp_at)
        for kib in args.kib:
            hidden_TH = torch.randn(kib // 8, HIDDEN).to(torch.bfloat16)
            ways = (dispatch(hidden_TH), echo(bytes(hidden_TH.nbytes)), tcp(bytes(hidden_TH.nbytes)))
            times: tuple[list[float], ...] = ([], [], [])
            for turn in range(_WARM_UP + (args.rounds if kib < 1024 else args.rounds // 10)):
                for way, into in zip(ways, times, strict=True):
                    began = time.perf_counter()
                    way()
                    if turn >= _WARM_UP:
                        into.append((time.perf_counter() - began) * 1e6)
            (ours, ours_99), (bare, bare_99), (raw, _) = (_quantiles(one) for one in times)
            yield Row(workers, kib, ours, ours_99, bare, bare_99, raw)


def _quantiles(times: list[float]) -> tuple[float, float]:
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


@contextmanager
def _process(serve: Callable[[Connection], None]) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()


@contextmanager
def _dispatch(addresses: list[str]) -> Iterator[Callable[[torch.Tensor], Callable[[], object]]]:
    """Every row has its eight experts spread over all workers."""
    with tempfile.TemporaryDirectory() as folder:
        placement = PlacementFile(Path(folder) / "placement")
        held = [tuple(range(TOP_K))[number :: len(addresses)] for number in range(len(addresses))]
        workers = tuple(
            WorkerEndpoint(f"w{number}", at, {0: ids})
            for number, (at, ids) in enumerate(zip(addresses, held, strict=True))
        )
        placement.write(PlacementTable.of(Stamp(1, 1), workers))
        client = ExpertClient(SETTINGS, ExpertShape("bench", HIDDEN, TOP_K), placement, torch.bfloat16, torch.bfloat16)

        def of(hidden_TH: torch.Tensor) -> Callable[[], object]:
            ids_TK = torch.arange(TOP_K).repeat(len(hidden_TH), 1)
            weights_TK = torch.rand(ids_TK.shape)
            return lambda: client.forward(0, hidden_TH, ids_TK, weights_TK)

        yield of
        client.close()


@contextmanager
def _echo(addresses: list[str]) -> Iterator[Callable[[bytes], Callable[[], object]]]:
    channels = [grpc.insecure_channel(at, options=channel_options(SETTINGS)) for at in addresses]
    outboxes: list[SimpleQueue[bytes]] = [SimpleQueue() for _ in addresses]
    streams = [
        channel.stream_stream("/bench.Echo/Echo")(iter(outbox.get, None))
        for channel, outbox in zip(channels, outboxes, strict=True)
    ]

    def of(payload: bytes) -> Callable[[], object]:
        def call() -> None:
            for outbox in outboxes:
                outbox.put(payload)
            for stream in streams:
                next(stream)

        return call

    yield of
    for channel in channels:
        channel.close()


def _tcp(addresses: list[str]) -> Callable[[bytes], Callable[[], object]]:
    sockets = []
    for at in addresses:
        one = socket.create_connection(("127.0.0.1", int(at.rsplit(":", 1)[1])))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets.append(one)

    def of(payload: bytes) -> Callable[[], object]:
        def call() -> None:
            for one in sockets:
                one.sendall(payload)
            for one in sockets:
                left = len(payload)
                while left:
                    left -= len(one.recv(left))

        return call

    return of


if __name__ == "__main__":
    main()
