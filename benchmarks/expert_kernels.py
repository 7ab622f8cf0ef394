"""Every form in which this host can hold DeepSeek-V3's experts: time, bytes and operations per call, by number of rows.

Rounds take turns between the forms and the least time of each counts, so a busy machine disturbs them alike. `GB/s` is
what the weights of the experts that are met take over the time, `GFLOP/s` the arithmetic of all pairs; both stand
beside this machine's own rates, measured in the same run with as many threads. `chosen` is what `experts.dtype: auto`
takes for a bfloat16 checkpoint. Each form has its own random weights.

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
    parser.add_argument("--hidden", type=int, default=7168, help="hidden size (DeepSeek-V3: 7168)")
    parser.add_argument("--intermediate", type=int, default=2048, help="intermediate size of one expert")
    parser.add_argument("--experts", type=int, default=16, help="experts that the worker holds")
    parser.add_argument("--top-k", type=int, default=8, help="experts per row, all of them on this worker")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7, help="rounds; a fifth of them above 64 rows")
    parser.add_argument("--json", action="store_true", help="everything as JSON on stdout, the table on stderr")
    args = parser.parse_args()
    if args.device == "cuda":
        from benchmarks.gpu_expert_kernels import report

        report(args)
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is loaded
    out = sys.stderr if args.json else sys.stdout
    import torch

    torch.set_num_threads(args.threads)
    bandwidth, matrix_rate = bandwidth_gb_per_s(), _matrix_gflop_per_s()
    print(f"{args.experts} experts of {args.hidden} x {args.intermediate}, top-{args.top_k}, {args.threads} threads; "
          f"this machine: {bandwidth:.1f} GB/s, {matrix_rate:.0f} GFLOP/s (bfloat16)", file=out)  # fmt: skip
    print(f"{'rows':>5} {'form':32} {'ms':>8} {'GB/s':>7} {'GFLOP/s':>8} {'bandwidth':>10} {'rate':>6} {'to best':>8}",
          file=out)  # fmt: skip
    rows: list[Row] = []
    for row in _measure(args, bandwidth, matrix_rate):
        rows.append(row)
        print(f"{row.rows:>5} {row.form:32} {row.ms:>8.2f} {row.gb_per_s:>7.1f} {row.gflop_per_s:>8.0f} "
              f"{row.of_bandwidth:>10.0%} {row.of_matrix_rate:>6.0%} {row.to_best:>7.2f}x"
              f"{'  chosen' if row.chosen else ''}", file=out, flush=True)  # fmt: skip
    if args.json:
        machine = {"threads": args.threads, "gb_per_s": bandwidth, "gflop_per_s": matrix_rate}
        print(json.dumps({"machine": machine, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))


def _measure(args: argparse.Namespace, bandwidth: float, matrix_rate: float) -> Iterator[Row]:
    import torch

    from deployments.experts.compute import ExpertCompute
    from deployments.experts.forms import Form
    from deployments.experts.operators import has_packed_kernel, has_vector_kernel
    from deployments.experts.weights import ExpertWeights

    forms = [Form.FLOAT32, Form.BFLOAT16]
    forms += [Form.VECTOR_BFLOAT16] if has_vector_kernel() else []
    forms += [Form.PACKED_BFLOAT16, Form.PACKED_FP8, Form.PACKED_INT8] if has_packed_kernel() else []
    chosen = [form for form in forms if form.value.startswith("bfloat16")][-1]
    layers = {form: _layer(form, args) for form in forms}
    computes = {
        form: ExpertCompute(ExpertWeights({0: layer}, args.experts, 0), args.threads)
        for form, layer in layers.items()
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for tokens in args.rows:
        hidden_TH = torch.randn(tokens, args.hidden, generator=generator).to(torch.bfloat16)
        ids_TK = torch.stack([torch.randperm(args.experts, generator=generator)[: args.top_k] for _ in range(tokens)])
        batch = (hidden_TH, ids_TK.to(torch.int16), torch.rand(ids_TK.shape, generator=generator) / args.top_k)
        best_s = dict.fromkeys(forms, float("inf"))
        for _ in range(1 + (args.repeats if tokens <= 64 else max(1, args.repeats // 5))):
            for form, compute in computes.items():
                best_s[form] = min(best_s[form], _seconds(partial(compute.forward, 0, *batch)))
        met = len(ids_TK.unique()) / args.experts
        flop = 6 * args.hidden * args.intermediate * ids_TK.numel()
        exact_s = min(best_s[form] for form in forms if "16" in form.value or "32" in form.value)
        for form, seconds in best_s.items():
            gb_per_s, gflop_per_s = layers[form].nbytes * met / seconds / 1e9, flop / seconds / 1e9
            yield Row(
                form.value, tokens, seconds * 1e3, gb_per_s, gflop_per_s, gb_per_s / bandwidth,
                gflop_per_s / matrix_rate, seconds / min(exact_s, seconds), form is chosen,
            )  # fmt: skip


def _layer(form: Form, args: argparse.Namespace) -> LayerExperts:
    """Random experts in `form`, made one at a time as a load does."""
    import torch

    from deployments.experts.weights import empty_layer, store
    from tests.checkpoints import quantise_fp8
    from tests.unit.deployments.experts.layers import spec_of

    layer = empty_layer(spec_of(args.hidden, args.intermediate), tuple(range(args.experts)), form)
    for local in range(args.experts):
        gate_up = torch.randn(2 * args.intermediate, args.hidden) / args.hidden**0.5
        down = torch.randn(args.hidden, args.intermediate) / args.intermediate**0.5
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
