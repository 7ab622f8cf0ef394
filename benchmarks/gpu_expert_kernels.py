"""The part of `benchmarks.expert_kernels` for GPUs: kernels alone, and a whole forward with its copies.

`kernels` is the time on the GPU of what is between the two copies: a CUDA graph of them, replayed, so that it does not
wait for the CPU that launches them. `forward` is the caller's time for the same rows, from the CPU's tensors and back
to them. A turn of more than 1024 rows goes in chunks, each of which reads the weights again: `GB/s` counts that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.gpu_turns import GpuTurns, chunks
from deployments.experts.kernels import Pairs
from deployments.experts.turn_layout import lay_out
from deployments.experts.weights import LayerExperts
from tests.gpu.layers import LAYER, batch, gpu_experts

FORMS = (Form.GROUPED_FP8, Form.GROUPED_BFLOAT16)
_MATRIX = 8192  # rows and columns of the matrices that measure the rate of operations
_READ_BYTES = 2 << 30
_LEAST_S = 0.03  # of one timing: many calls in a row, so that the GPU never waits for the CPU


@dataclass(frozen=True)
class Card:
    """What this GPU does at best, measured."""

    name: str
    gb_per_s: float  # of reading memory
    bfloat16_tflop_per_s: float
    fp8_tflop_per_s: float

    def rate(self, form: Form) -> float:
        """Return the matrix rate of the dtype in which the form multiplies."""
        return self.fp8_tflop_per_s if form is Form.GROUPED_FP8 else self.bfloat16_tflop_per_s


@dataclass(frozen=True)
class GpuRow:
    """One form at one number of rows."""

    form: str
    rows: int
    kernels_ms: float
    gb_per_s: float
    tflop_per_s: float
    of_bandwidth: float
    of_matrix_rate: float
    forward_ms: float


def report(args: argparse.Namespace, hidden: int, intermediate: int, experts: int) -> None:
    """Print the table, and with --json its rows and the card's rates."""
    out = sys.stderr if args.json else sys.stdout
    card = measure_card()
    print(f"{experts} experts of {hidden} x {intermediate}, top-{args.top_k}; {card.name}: "
          f"{card.gb_per_s:.0f} GB/s read, {card.bfloat16_tflop_per_s:.0f} TFLOP/s bfloat16, "
          f"{card.fp8_tflop_per_s:.0f} TFLOP/s FP8", file=out)  # fmt: skip
    print(f"{'rows':>5} {'form':24} {'kernels ms':>10} {'GB/s':>6} {'TFLOP/s':>8} {'bandwidth':>10} {'rate':>6} "
          f"{'forward ms':>11}", file=out)  # fmt: skip
    rows = []
    for row in measure(card, hidden, intermediate, experts, args.top_k, args.rows, args.threads):
        rows.append(row)
        print(f"{row.rows:>5} {row.form:24} {row.kernels_ms:>10.3f} {row.gb_per_s:>6.0f} {row.tflop_per_s:>8.1f} "
              f"{row.of_bandwidth:>10.0%} {row.of_matrix_rate:>6.0%} {row.forward_ms:>11.3f}",
              file=out, flush=True)  # fmt: skip
    if args.json:
        values = {"card": dataclasses.asdict(card), "rows": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(values, indent=2))


def measure_card() -> Card:
    """Measure memory by reading 2 GiB, and products of random square matrices."""
    values = torch.ones(_READ_BYTES // 8, dtype=torch.int64, device="cuda")
    read_s = _gpu_seconds(values.sum)
    left, right = torch.randn(2, _MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16)
    flop = 2 * _MATRIX**3 / 1e12
    bfloat16 = flop / _gpu_seconds(lambda: left @ right)
    fp8 = 0.0
    if torch.cuda.get_device_capability() >= (8, 9):
        left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        fp8 = flop / _gpu_seconds(lambda: torch._scaled_mm(left8, right8, one, one, out_dtype=torch.bfloat16))
    return Card(torch.cuda.get_device_name(), values.nbytes / read_s / 1e9, bfloat16, fp8)


def measure(
    card: Card,
    hidden: int,
    inner: int,
    held: int,
    top_k: int,
    rows: list[int],
    threads: int = 1,
    forms: tuple[Form, ...] = FORMS,
) -> Iterator[GpuRow]:
    """Yield a row for each form and number of rows. A row's experts are all held, and drawn at random."""
    for form in forms:
        layer = gpu_experts(form, hidden, inner, held, first=0)
        compute, turns = ExpertCompute(layer.weights, threads), GpuTurns(form, hidden, inner, held)
        for number in rows:
            turn = batch(number, hidden, top_k, held, first=0, elsewhere=0.0)
            calls, experts_read = _calls(turns, layer.layer, turn)
            kernels_s = _gpu_seconds(_captured(calls))
            forward_s = _seconds(partial(compute.forward, LAYER, *turn))
            gb_per_s = layer.layer.nbytes / held * experts_read / kernels_s / 1e9
            tflop_per_s = 6 * hidden * inner * number * top_k / kernels_s / 1e12
            yield GpuRow(
                form.value, number, kernels_s * 1e3, gb_per_s, tflop_per_s, gb_per_s / card.gb_per_s,
                tflop_per_s / card.rate(form), forward_s * 1e3,
            )  # fmt: skip


def _calls(
    turns: GpuTurns, layer: LayerExperts, turn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[list[Callable[[], None]], int]:
    """Return the kernels of each chunk, everything they read being on the GPU, and how many experts they read."""
    hidden_TH, ids_TK, weights_TK = turn
    tokens_P = np.arange(ids_TK.numel()) // ids_TK.shape[1]
    pairs = Pairs(tokens_P, ids_TK.numpy().ravel().astype(np.int64), weights_TK.numpy().ravel())
    calls, experts_read = [], 0
    for first, rows, chunk in chunks(pairs, len(hidden_TH), ids_TK.shape[1]):
        counts_N = np.bincount(chunk.local_P, minlength=len(layer.ids))
        launch, words = turns.launch(counts_N), torch.zeros(turns.words, dtype=torch.int32)
        sections = lay_out(words.numpy(), chunk, rows, counts_N, launch.rows)
        on_gpu = hidden_TH[first : first + rows].cuda(), words.cuda()
        out_TH = torch.empty_like(on_gpu[0])
        calls.append(partial(turns.compute, layer, *on_gpu, sections, launch, out_TH))
        experts_read += int(np.count_nonzero(counts_N))
    return calls, experts_read


def _captured(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of all calls."""
    for call in calls:
        call()  # a kernel that is launched for the first time cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay: Callable[[], None] = graph.replay
    return replay


def _gpu_seconds(call: Callable[[], object]) -> float:
    """Of one call on the GPU: the median of five timings of many."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, int(_LEAST_S / (time.perf_counter() - began)))
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call: the median of 20."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
