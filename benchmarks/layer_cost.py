"""What one MoE layer of DeepSeek-V3's real sizes costs on this host, by the form of its experts' weights.

A checkpoint of one layer (hidden 7168, 128 heads of MLA, the shared expert, and as many routed experts of 2048 as
`--experts` says) runs split: a compiled attention engine and expert workers on this machine's cores. Its step also
holds a small embedding and head, and the engine's own work of about 2 ms. Bytes are what a step must read at least:
attention, the shared expert, and the experts that its rows are expected to meet. From them and the share of the
bandwidth that is reached follows what another host would need.
`python -m benchmarks.layer_cost --help`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring.bandwidth import bandwidth_gb_per_s
from tests.checkpoints import Shape, make_checkpoint
from tests.engines import Engine
from tests.expert_processes import ExpertPlane

HIDDEN, INNER, TOP_K = 7168, 2048, 8
ATTENTION_PARAMETERS = (
    HIDDEN * 1536 + 1536 * 128 * (128 + 64) + HIDDEN * (512 + 64) + 512 * 128 * 2 * 128 + 128 * 128 * HIDDEN
)
EXPERT_PARAMETERS = 3 * HIDDEN * INNER
_BYTES = {"bfloat16": 2.0, "int8": 1.0, "fp8": 1.0 + 4 / 128**2}  # per parameter; INT8's scales per row are no more
_DTYPE = {"bfloat16": "bfloat16", "int8": "int8", "fp8": "auto"}
_BATCHES = (1, 8, 32)
_STEPS = 24
_PREFILL = 511


@dataclass(frozen=True)
class Row:
    """One load on one form of the experts."""

    form: str
    load: str
    step_ms: float
    read_gib: float  # the least that a step must read
    gb_per_s: float


def main() -> None:
    """Print the table, and with --json its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32, help="routed experts of the layer (256 in DeepSeek-V3)")
    parser.add_argument("--forms", nargs="+", default=list(_BYTES), choices=list(_BYTES))
    parser.add_argument("--workers", type=int, default=2, help="expert workers, of one thread each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout, the table on stderr")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layer-") as folder:
        rows = [row for form in args.forms for row in _measure(Path(folder), form, args)]
    out = sys.stderr if args.json else sys.stdout
    bandwidth = bandwidth_gb_per_s()
    print(f"memory bandwidth of this host, all cores reading: {bandwidth:.1f} GB/s", file=out)
    print(f"{'experts':9} {'load':16} {'step, ms':>9} {'reads, GiB':>11} {'GB/s':>6} {'of bandwidth':>13}", file=out)
    for row in rows:
        share = row.gb_per_s / bandwidth
        print(f"{row.form:9} {row.load:16} {row.step_ms:9.1f} {row.read_gib:11.2f} {row.gb_per_s:6.1f} {share:12.0%}",
              file=out)  # fmt: skip
    if args.json:
        of_rows = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"bandwidth_gb_per_s": bandwidth, "rows": of_rows}, indent=2))


def _measure(folder: Path, form: str, args: argparse.Namespace) -> Iterator[Row]:
    shape = Shape(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_layers=1, dense_layers=0, num_experts=args.experts,
        top_k=TOP_K, q_lora_rank=1536, heads=128, head_dim=128, n_group=1, topk_group=1, max_positions=1024,
        fp8_experts=form == "fp8",
    )  # fmt: skip
    checkpoint = folder / ("fp8" if form == "fp8" else "bfloat16")
    if not checkpoint.exists():
        make_checkpoint(checkpoint, shape, dtype="bfloat16")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plane = stack.enter_context(ExpertPlane(checkpoint, place, dtype="bfloat16"))
        plane.publish(plane.start([1] * args.workers, form=_DTYPE[form]))
        engine_args = {**plane.engine_args, "max_model_len": 1024, "hf_overrides": {"quantization_config": None}}
        engine = stack.enter_context(
            Engine(
                checkpoint, engine_args=engine_args, dtype="bfloat16", eager=False, threads=torch.get_num_threads(),
                environment={"VLLM_USE_AOT_COMPILE": "0", "OMP_WAIT_POLICY": "PASSIVE"}, start_timeout_s=900,
            )
        )  # fmt: skip
        engine.generate([[1, 2, 3]], 4)
        for batch in _BATCHES:
            times = []
            for _ in range(args.repeats):
                run = engine.generate([random.choices(range(10, 250), k=4) for _ in range(batch)], _STEPS + 1, 900)
                times.append(run.decode_seconds / _STEPS)
            yield _row(form, f"decode, batch {batch}", statistics.median(times), batch, args.experts)
        times = [
            engine.generate([random.choices(range(10, 250), k=_PREFILL)], 1, 900).seconds for _ in range(args.repeats)
        ]
        yield _row(form, f"prefill, {_PREFILL} rows", statistics.median(times), _PREFILL, args.experts)


def _row(form: str, load: str, step_s: float, rows: int, experts: int) -> Row:
    met = experts * (1 - (1 - TOP_K / experts) ** rows)  # expected number of different experts
    read = (ATTENTION_PARAMETERS + EXPERT_PARAMETERS) * 2 + met * EXPERT_PARAMETERS * _BYTES[form]
    return Row(form, load, step_s * 1e3, read / 2**30, read / step_s / 1e9)


if __name__ == "__main__":
    main()
