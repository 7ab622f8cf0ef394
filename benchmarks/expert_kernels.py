"""Every form in which this host can hold DeepSeek-V3's experts: time, bytes and operations per call, by number of rows.

Rounds take turns between the forms and the least time of each counts, so a busy machine disturbs them alike. `GB/s` is
what the weights of the experts that are met take over the time, `GFLOP/s` the arithmetic of all pairs; both stand
beside this machine's own rates, measured in the same run with as many threads. `chosen` is what a worker with
`experts.dtype: auto` takes for a bfloat16 checkpoint: form and slices as calibrated, at the start of the run. Each form
has its own random weights. Without sizes it measures DeepSeek-V3's experts, and small ones.

    python -m benchmarks.expert_kernels --json
    python -m benchmarks.expert_kernels --hidden 1024 --intermediate 512 --experts 32
    python -m benchmarks.expert_kernels --device cuda --experts 32 --rows 1 8 32 128 1024 4096
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.measuring.bandwidth import bandwidth_gb_per_s

if TYPE_CHECKING:
    from deployments.experts.forms import Form
    from deployments.experts.weights import LayerExperts

_GEMM = 2048  # rows and columns of the matrices that measure the rate of operations


@dataclass(frozen=True)
class Row:
    """One form at one number of rows."""

    form: str
    hidden: int
    rows: int
    ms: float
    gb_per_s: float
    gflop_per_s: float
    of_bandwidth: float
    of_matrix_rate: float
    to_best: float  # its time over that of the fastest form of 16 bits or more; at least 1
    chosen: bool


def main() -> None:
    """Print the table, and with --json its rows and the machine's rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: this machine's GPU")
    parser.add_argument("--hidden", type=int, nargs="+", default=[7168, 1024], help="hidden size (DeepSeek-V3: 7168)")
    parser.add_argument("--intermediate", type=int, nargs="+", default=[2048, 512], help="of one expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32], help="experts that the worker holds")
    parser.add_argument("--top-k", type=int, default=8, help="experts per row, all of them on this worker")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7, help="rounds; a fifth of them above 64 rows")
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout, the table on stderr")
    args = parser.parse_args()
    if args.device == "cuda":
        from benchmarks.gpu_expert_kernels import report

        report(args, args.hidden[0], args.intermediate[0], args.experts[0])
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is loaded
    out = sys.stderr if args.json else sys.stdout
    import torch

    torch.set_num_threads(args.threads)
    bandwidth, matrix_rate = bandwidth_gb_per_s(), _matrix_gflop_per_s()
    print(f"{args.threads} threads; this machine: {bandwidth:.1f} GB/s, {matrix_rate:.0f} GFLOP/s (bfloat16)", file=out)
    rows: list[Row] = []
    for hidden, intermediate, experts in zip(args.hidden, args.intermediate, args.experts, strict=True):
        print(f"\n{experts} experts of {hidden} x {intermediate}, top-{args.top_k}\n{'rows':>5} {'form':68} {'ms':>8} "
              f"{'GB/s':>7} {'GFLOP/s':>8} {'bandwidth':>10} {'rate':>6} {'to best':>8}", file=out)  # fmt: skip
        worst = 1.0
        for row in _measure(args, (hidden, intermediate, experts), bandwidth, matrix_rate):
            rows.append(row)
            worst = max(worst, row.to_best) if row.chosen else worst
            print(f"{row.rows:>5} {row.form:68} {row.ms:>8.2f} {row.gb_per_s:>7.1f} {row.gflop_per_s:>8.0f} "
                  f"{row.of_bandwidth:>10.0%} {row.of_matrix_rate:>6.0%} {row.to_best:>7.2f}x"
                  f"{'  chosen' if row.chosen else ''}", file=out, flush=True)  # fmt: skip
        print(f"the choice takes at most {worst:.2f} times the best", file=out)
    if args.json:
        machine = {"threads": args.threads, "gb_per_s": bandwidth, "gflop_per_s": matrix_rate}
        print(json.dumps({"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))


def _measure(
    args: argparse.Namespace, size: tuple[int, int, int], bandwidth: float, matrix_rate: float
) -> Iterator[Row]:
    import torch

    from deployments.experts.calibration import choice_text, fastest_form, many_rows_from
    from deployments.experts.compute import ExpertCompute
    from deployments.experts.forms import Form
    from deployments.experts.operators import has_packed_kernel, has_vector_kernel
    from deployments.experts.weights import ExpertWeights
    from tests.unit.deployments.experts.layers import spec_of

    hidden, intermediate, experts = size
    bfloat16 = [Form.PACKED_BFLOAT16] if has_packed_kernel() else []
    bfloat16 += [Form.VECTOR_BFLOAT16] if has_vector_kernel() else []
    bfloat16 += [Form.BFLOAT16]
    forms = [Form.FLOAT32, *reversed(bfloat16)]
    forms += [Form.PACKED_FP8, Form.PACKED_INT8] if has_packed_kernel() else []
    chosen = fastest_form(bfloat16, spec_of(hidden, intermediate), args.threads)
    weights = {form: ExpertWeights({0: _layer(form, size)}, experts, 0) for form in forms}
    many_rows = many_rows_from(weights[chosen], {0: range(experts)}, args.threads)
    choice = choice_text(chosen, many_rows)
    computes = {form.value: ExpertCompute(weights[form], args.threads) for form in forms}
    held_bytes = {form.value: weights[form].nbytes for form in forms}
    computes[choice] = ExpertCompute(weights[chosen], args.threads, many_rows=many_rows)
    held_bytes[choice] = weights[chosen].nbytes
    generator = torch.Generator().manual_seed(0)
    for tokens in args.rows:
        hidden_TH = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
        ids_TK = torch.stack([torch.randperm(experts, generator=generator)[: args.top_k] for _ in range(tokens)])
        batch = (hidden_TH, ids_TK.to(torch.int16), torch.rand(ids_TK.shape, generator=generator) / args.top_k)
        best_s = dict.fromkeys(computes, float("inf"))
        for _ in range(1 + (args.repeats if tokens <= 64 else max(1, args.repeats // 5))):
            for form, compute in computes.items():
                best_s[form] = min(best_s[form], _seconds(partial(compute.forward, 0, *batch)))
        met = len(ids_TK.unique()) / experts
        flop = 6 * hidden * intermediate * ids_TK.numel()
        exact_s = min(seconds for form, seconds in best_s.items() if "16" in form or "32" in form)
        for form, seconds in best_s.items():
            gb_per_s, gflop_per_s = held_bytes[form] * met / seconds / 1e9, flop / seconds / 1e9
            yield Row(
                form, hidden, tokens, seconds * 1e3, gb_per_s, gflop_per_s, gb_per_s / bandwidth,
                gflop_per_s / matrix_rate, seconds / min(exact_s, seconds), form == choice,
            )  # fmt: skip


def _layer(form: Form, size: tuple[int, int, int]) -> LayerExperts:
    """Random experts in `form`, made one at a time as a load does."""
    import torch

    from deployments.experts.storing import store
    from deployments.experts.weights import empty_layer
    from tests.checkpoints import quantise_fp8
    from tests.unit.deployments.experts.layers import spec_of

    hidden, intermediate, experts = size
    layer = empty_layer(spec_of(hidden, intermediate), tuple(range(experts)), form)
    for local in range(experts):
        gate_up = torch.randn(2 * intermediate, hidden) / hidden**0.5
        down = torch.randn(hidden, intermediate) / intermediate**0.5
        if "fp8" in form.value:
            assert layer.gate_up_scale is not None
            assert layer.down_scale is not None
            gate_up, layer.gate_up_scale[local] = quantise_fp8(gate_up)
            down, layer.down_scale[local] = quantise_fp8(down)
        elif "int8" not in form.value:
            gate_up, down = gate_up.to(layer.down.dtype), down.to(layer.down.dtype)
        store(layer, local, gate_up, down)
    return layer


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _matrix_gflop_per_s() -> float:
    """Of a square bfloat16 product, best of five."""
    import torch

    left, right = torch.ones(2, _GEMM, _GEMM, dtype=torch.bfloat16)
    return 2 * _GEMM**3 / min(_seconds(lambda: left @ right) for _ in range(5)) / 1e9


if __name__ == "__main__":
    main()
