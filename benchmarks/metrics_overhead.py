"""What metrics cost a decode step: one real engine and its expert workers, metered and not, in turn, in one run.

The engine's side is switched between blocks of steps; the workers' side by publishing other processes, of which there
are several equal sets of either kind. Prints the difference per step with its 95 % interval: of the time that passed,
and of the CPU time of engine and workers, which other work on the machine disturbs less. All of the latter is taken for
part of the step, also what other threads spend on putting samples into histograms.
`python -m benchmarks.metrics_overhead --help`
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.model.spec import load_model_spec
from tests.expert_processes import ExpertPlane

MODEL = Path("models/demo")
LIMIT = 0.01  # of a decode step
_WARM_UP = 4  # pairs of blocks
_SETS = 2  # of workers, of either kind
_PROMPT_TOKENS = 8


def main() -> None:
    """Exit status 1 when the limit is exceeded beyond doubt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8, help="sequences per decode step")
    parser.add_argument("--steps", type=int, default=50, help="steps per block")
    parser.add_argument("--pairs", type=int, default=150, help="pairs of blocks, one metered and one not")
    args = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ExpertPlane(MODEL, Path(folder), dtype="bfloat16") as plane:
        metered, plain = ([plane.start([1, 1], metered=on) for _ in range(_SETS)] for on in (True, False))
        plane.publish(metered[0])
        engine = _Engine(plane.engine_args, args.sequences)
        layers = len(load_model_spec(MODEL).moe_layers)
        with_metrics, without = _Times(), _Times()
        for pair in range(-_WARM_UP, args.pairs):
            for on in random.sample((True, False), 2):
                workers = random.choice(metered if on else plain)
                plane.publish(workers)
                pids = [os.getpid(), *(plane.pid(worker) for worker in workers)]
                wall_s, cpu_s = engine.steps(args.steps, on, pids)
                if pair >= 0:
                    times = with_metrics if on else without
                    times.wall_s.append(wall_s)
                    times.cpu_s.append(cpu_s)
        _report(with_metrics, without, layers)


@dataclass
class _Times:
    """Per step, one entry per block."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


class _Engine:
    """vLLM on the demo model, its experts elsewhere, which decodes for ever."""

    def __init__(self, engine_args: Any, sequences: int) -> None:
        import vllm

        from deployments.attention.dispatch_ops import connected
        from deployments.attention.remote_experts import RemoteRoutedExperts

        self._llm = vllm.LLM(
            str(MODEL), dtype="bfloat16", max_model_len=1024, max_num_seqs=sequences, enforce_eager=True,
            kv_cache_memory_bytes=256 << 20, attention_config={"backend": "CPU_MLA"}, enable_prefix_caching=False,
            compilation_config={"custom_ops": ["all", "-rotary_embedding"]}, **engine_args,
        )  # fmt: skip

        def clients(model: Any) -> Any:
            layers = [layer for layer in model.modules() if isinstance(layer, RemoteRoutedExperts)]
            return [connected(layer.layer_name).client for layer in layers]

        self._client = self._llm.apply_model(clients)[0][0]
        self._meter = self._client.meter
        self._sequences = sequences
        self._asked = 0

    def steps(self, count: int, metered: bool, pids: Sequence[int]) -> tuple[float, float]:
        """Seconds per decode step, all sequences running, and CPU seconds of `pids`."""
        from vllm import SamplingParams

        self._client.meter = self._meter if metered else None
        engine = self._llm.llm_engine
        for _ in range(self._sequences):
            self._asked += 1
            prompt = {"prompt_token_ids": random.choices(range(10, 250), k=_PROMPT_TOKENS)}
            engine.add_request(str(self._asked), prompt, SamplingParams(max_tokens=count + 4, ignore_eos=True))
        for _ in range(2):  # prefill, and the first step after it
            engine.step()
        began, cpu_began = time.perf_counter(), _cpu_s(pids)
        for _ in range(count):
            engine.step()
        took, cpu_took = time.perf_counter() - began, _cpu_s(pids) - cpu_began
        while engine.has_unfinished_requests():
            engine.step()
        return took / count, cpu_took / count


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU time of processes so far; Linux makes a clock's id of a pid like this (clock_getcpuclockid(3))."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def _report(with_metrics: _Times, without: _Times, layers: int) -> None:
    step_s = statistics.median(without.wall_s)
    print(f"decode step without metrics: {1e3 * step_s:.2f} ms ({layers} MoE layers), {len(without.wall_s)} pairs")
    pairs = (("time", with_metrics.wall_s, without.wall_s), ("CPU", with_metrics.cpu_s, without.cpu_s))
    for what, ours, theirs in pairs:
        added = [one - other for one, other in zip(ours, theirs, strict=True)]
        medians = sorted(statistics.median(random.choices(added, k=len(added))) for _ in range(2000))
        middle, low, high = statistics.median(added), medians[50], medians[-51]
        print(
            f"{what:>4} added: {1e6 * middle:.0f} us per step [{1e6 * low:.0f}, {1e6 * high:.0f}], "
            f"{1e6 * middle / layers:.1f} us per layer; part of the step {middle / step_s:.2%} "
            f"[{low / step_s:.2%}, {high / step_s:.2%}], target below {LIMIT:.0%}"
        )
        if low / step_s > LIMIT:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
