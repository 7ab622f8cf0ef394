"""Tokens per second of a model split over an attention engine and expert workers, against the same model unsplit.

Both sides run on this machine's cores in one go, in turn, each load right after the other's: unsplit is vLLM compiled,
with all cores; split is the same engine with the plugin, and the expert workers, all on those cores too. Real engines,
real workers, real gRPC; no gateway on either side. A start is a new set of processes; ratios are of neighbouring runs.
FP8 experts are compared with the unsplit engine on a bfloat16 checkpoint of the same sizes.
`python -m benchmarks.split_vs_unsplit --help`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.tokens.placement import WorkerEndpoint
from tests.checkpoints import Shape, make_checkpoint
from tests.engines import Engine
from tests.expert_processes import ExpertPlane

# 768 M parameters: large enough that a step is work, small enough that two copies and their workers fit a laptop.
SHAPE = Shape(
    hidden_size=1024, moe_intermediate_size=512, num_layers=8, num_experts=64, top_k=8, q_lora_rank=None,
)  # fmt: skip
_SETTLE_S = 0.5  # threads of the other side spin for 0.2 s after its last step
_VOCABULARY = range(10, 250)


@dataclass(frozen=True)
class Load:
    """What an engine is asked for, all at once."""

    name: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    targets: dict[str, float]  # least ratio split/unsplit, by form of the experts

    @property
    def counts_prefill(self) -> bool:
        """Whether the prompts' tokens are counted, rather than the new ones after the first."""
        return self.new_tokens == 1


LOADS = (
    Load("decode, batch 1", 1, 8, 48, {"bfloat16": 0.70, "int8": 0.75, "fp8": 0.75}),
    Load("decode, batch 8", 8, 8, 48, {"bfloat16": 1.0, "int8": 1.2, "fp8": 1.1}),
    Load("decode, batch 32", 32, 8, 48, {"bfloat16": 1.25, "int8": 1.6, "fp8": 1.2}),
    Load("prefill 32 x 512", 32, 511, 1, {"bfloat16": 1.8, "int8": 2.1, "fp8": 1.7}),
)


@dataclass(frozen=True)
class Pair:
    """One load on both sides, one right after the other, in tokens per second."""

    start: int
    form: str
    load: str
    unsplit: float
    split: float


def main() -> None:
    """Print the table, and with --json all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="times that all processes start anew")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs per start and decode load (prefill: one)")
    parser.add_argument("--forms", nargs="+", default=["bfloat16", "int8", "fp8"], help="forms of the experts' weights")
    parser.add_argument("--loads", nargs="+", default=["1", "8", "32", "prefill"], help="1, 8, 32, prefill")
    parser.add_argument("--workers", type=int, default=2, help="expert workers, of one thread each")
    parser.add_argument("--attention-threads", type=int, default=2, help="threads of the split side's engine")
    parser.add_argument("--eager", action="store_true", help="do not compile the split side's attention half")
    parser.add_argument("--json", action="store_true", help="pairs as JSON on stdout, the table on stderr")
    args = parser.parse_args()
    loads = [load for load in LOADS if load.name.split()[-1] in args.loads or load.name.split()[0] in args.loads]
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory(prefix="split-") as folder:
        for start in range(args.starts):
            for pair in _start(Path(folder), start, args, loads):
                pairs.append(pair)
                print(f"start {pair.start}, {pair.form}, {pair.load}: unsplit {pair.unsplit:.1f}, split "
                      f"{pair.split:.1f} tokens/s, {pair.split / pair.unsplit:.2f}x", file=sys.stderr, flush=True)
    print(_table(pairs, loads, args.forms), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps([dataclasses.asdict(pair) for pair in pairs], indent=2))


def _checkpoints(folder: Path, forms: Sequence[str]) -> tuple[Path, Path | None]:
    """Return the bf16 checkpoint, and one with FP8 experts if that is asked for; made once."""
    plain, fp8 = folder / "bfloat16", folder / "fp8"
    shape = dataclasses.replace(SHAPE, max_positions=1024)
    if "fp8" in forms and not fp8.exists():
        make_checkpoint(fp8, dataclasses.replace(shape, fp8_experts=True), dtype="bfloat16")
    if not plain.exists():
        make_checkpoint(plain, shape, dtype="bfloat16")
    return plain, fp8 if "fp8" in forms else None


def _start(folder: Path, start: int, args: argparse.Namespace, loads: Sequence[Load]) -> Iterator[Pair]:
    plain, fp8 = _checkpoints(folder, args.forms)
    with ExitStack() as stack:
        unsplit = stack.enter_context(_engine(plain, {}, threads=os.cpu_count() or 1, compiled=True))
        splits: dict[str, tuple[Engine, ExpertPlane, Sequence[WorkerEndpoint]]] = {}
        for checkpoint, forms in ((plain, [f for f in args.forms if f != "fp8"]), (fp8, ["fp8"])):
            if checkpoint is None or not forms:
                continue
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            plane = stack.enter_context(ExpertPlane(checkpoint, place, dtype="bfloat16"))
            sets = {form: plane.start([1] * args.workers, form=_EXPERTS_DTYPE[form]) for form in forms}
            plane.publish(sets[forms[0]])
            engine = stack.enter_context(
                _engine(checkpoint, plane.engine_args, args.attention_threads, compiled=not args.eager)
            )
            splits |= {form: (engine, plane, workers) for form, workers in sets.items()}
        for form in args.forms:
            engine, plane, workers = splits[form]
            plane.publish(workers)
            for load in loads:
                for repeat in range(-1, 1 if load.counts_prefill else args.pairs):
                    sides = [unsplit, engine]
                    rates: dict[int, float] = {}
                    warm_up = dataclasses.replace(load, new_tokens=min(4, load.new_tokens), prompt_tokens=8)
                    for side in random.sample(sides, 2):
                        rates[id(side)] = _tokens_per_s(side, warm_up if repeat < 0 else load)
                        time.sleep(_SETTLE_S)
                    if repeat >= 0:
                        yield Pair(start, form, load.name, rates[id(unsplit)], rates[id(engine)])


_EXPERTS_DTYPE = {"bfloat16": "bfloat16", "int8": "int8", "fp8": "auto"}


def _engine(checkpoint: Path, engine_args: Mapping[str, Any], threads: int, compiled: bool) -> Engine:
    args = {"max_model_len": 1024, "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 512 << 20}
    split = dict(engine_args)
    environment = {"VLLM_USE_AOT_COMPILE": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    if split:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as deployments.attention.engine_args
        if checkpoint.name == "fp8":
            split["hf_overrides"] = {"quantization_config": None}  # the attention half has no FP8 tensor
    return Engine(
        checkpoint, engine_args=args | split, dtype="bfloat16", eager=not compiled, threads=threads,
        environment=environment, start_timeout_s=900,
    )  # fmt: skip


def _tokens_per_s(engine: Engine, load: Load) -> float:
    prompts = [random.choices(_VOCABULARY, k=load.prompt_tokens) for _ in range(load.prompts)]
    run = engine.generate(prompts, load.new_tokens, timeout_s=900)
    if load.counts_prefill:
        return load.prompts * load.prompt_tokens / run.seconds
    return load.prompts * (load.new_tokens - 1) / run.decode_seconds


def _table(pairs: Sequence[Pair], loads: Sequence[Load], forms: Sequence[str]) -> str:
    lines = [
        f"{'experts':9} {'load':17} {'unsplit':>9} {'split':>9} {'ratio':>6} {'all ratios':>13} {'target':>7}",
    ]
    for form in forms:
        for load in loads:
            mine = [pair for pair in pairs if (pair.form, pair.load) == (form, load.name)]
            ratios = sorted(pair.split / pair.unsplit for pair in mine)
            unsplit, split = (statistics.median(getattr(p, side) for p in mine) for side in ("unsplit", "split"))
            target = load.targets.get(form)
            met = "" if target is None else f"{target:.2f} {'met' if statistics.median(ratios) >= target else 'MISSED'}"
            lines.append(
                f"{form:9} {load.name:17} {unsplit:9.1f} {split:9.1f} {statistics.median(ratios):6.2f} "
                f"{f'{ratios[0]:.2f}..{ratios[-1]:.2f}':>13} {met:>11}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
