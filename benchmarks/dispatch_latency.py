"""What a dispatch costs beyond the wire: our client and server against a bare gRPC echo and a bare TCP socket.

All three move the same bytes between two processes on loopback, in turn, in one run, so the ratios hold on a noisy
machine. Expert compute is the identity. `python -m benchmarks.dispatch_latency --help`
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import torch

from cluster.config import DispatchConfig
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile, PlacementTable, WorkerEndpoint
from routing.tokens.server import ExpertServer

import grpc  # isort: skip  # after routing, which sets gRPC's endpoint experiments

TOP_K = 8
SETTINGS = DispatchConfig()


def serve_dispatch(pipe: Connection, hidden: int) -> None:
    """Our server with identity experts."""
    torch.set_num_threads(1)
    server = ExpertServer(lambda layer, hidden_TH, ids_TK, weights_TK: hidden_TH, hidden, "bench", SETTINGS)
    pipe.send(server.start("127.0.0.1"))
    pipe.recv()
    server.stop(0)


def serve_echo(pipe: Connection, hidden: int) -> None:
    """A gRPC stream that sends every message back."""
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.stream_stream_rpc_method_handler(lambda frames, context: frames)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(f"127.0.0.1:{port}")
    pipe.recv()
    server.stop(0)


def serve_tcp(pipe: Connection, hidden: int) -> None:
    """A socket that sends every byte back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(1 << 20):
            peer.sendall(data)


def main() -> None:
    """Run and print one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=7168, help="hidden size (DeepSeek-V3: 7168)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64], help="rows per dispatch")
    parser.add_argument("--rounds", type=int, default=300, help="dispatches per way and batch size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for target in (serve_dispatch, serve_echo, serve_tcp):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=target, args=(theirs, args.hidden), daemon=True))
        processes[-1].start()
        ends.append(ours)
    dispatch_at, echo_at, tcp_port = (end.recv() for end in ends)

    with tempfile.TemporaryDirectory() as folder:
        placement = PlacementFile(Path(folder) / "placement.json")
        placement.write(PlacementTable(1, (WorkerEndpoint("w", dispatch_at, {0: tuple(range(TOP_K))}),)))
        shape = ExpertShape("bench", args.hidden, TOP_K)
        client = ExpertClient(SETTINGS, shape, placement, torch.bfloat16, torch.bfloat16)
        channel = grpc.insecure_channel(echo_at, options=[("grpc.max_receive_message_length", -1)])
        outbox: SimpleQueue[bytes] = SimpleQueue()
        echoes = channel.stream_stream("/bench.Echo/Echo")(iter(outbox.get, None))
        tcp = socket.create_connection(("127.0.0.1", tcp_port))
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        print("tokens  KiB each way  dispatch ms  gRPC echo ms    TCP ms  dispatch/echo")
        for tokens in args.tokens:
            hidden_TH = torch.randn(tokens, args.hidden, dtype=torch.bfloat16)
            ids_TK = torch.arange(TOP_K).repeat(tokens, 1)
            weights_TK = torch.rand(tokens, TOP_K)
            payload = bytes(hidden_TH.nbytes)

            def dispatch(h: torch.Tensor = hidden_TH, i: torch.Tensor = ids_TK, w: torch.Tensor = weights_TK) -> None:
                client.forward(0, h, i, w)

            def echo(p: bytes = payload) -> None:
                outbox.put(p)
                next(echoes)

            def bare(p: bytes = payload) -> None:
                tcp.sendall(p)
                left = len(p)
                while left:
                    left -= len(tcp.recv(left))

            ways: tuple[Callable[[], None], ...] = (dispatch, echo, bare)
            times: list[list[float]] = [[], [], []]
            for turn in range(args.rounds + 20):
                for way, into in zip(ways, times, strict=True):
                    started = time.perf_counter()
                    way()
                    if turn >= 20:
                        into.append((time.perf_counter() - started) * 1e3)
            ours_ms, echo_ms, tcp_ms = (statistics.median(t) for t in times)
            kib, ratio = len(payload) / 1024, ours_ms / echo_ms
            print(f"{tokens:>6} {kib:>13.0f} {ours_ms:>12.3f} {echo_ms:>13.3f} {tcp_ms:>9.3f} {ratio:>14.2f}")
        client.close()
        channel.close()
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main()
