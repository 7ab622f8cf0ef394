"""What metrics cost a decode step: one real engine and its expert workers, metered and not, in turn, in one run.

The engine's side is switched between blocks of steps; the workers' side by publishing other processes, of which there
are several equal sets of either kind. Prints the difference per step with its 95 % interval.
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
from pathlib import Path
from typing import Any

from cluster.model import load_model_spec
from routing.placement import WorkerEndpoint
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
    parser.add_argument("--steps", type=int, default=100, help="steps per block")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks, one metered and one not")
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
        with_s, without_s = [], []
        for pair in range(-_WARM_UP, args.pairs):
            for on in random.sample((True, False), 2):
                step_s = _block(plane, engine, random.choice(metered if on else plain), on, args.steps)
                if pair >= 0:
                    (with_s if on else without_s).append(step_s)
        _report(with_s, without_s, layers)


class _Engine:
    """vLLM on the demo model, its experts elsewhere, which decodes for ever."""

    def __init__(self, engine_args: Any, sequences: int) -> None:
        import vllm

        from deployments.remote_experts import RemoteRoutedExperts

        self._llm = vllm.LLM(
            str(MODEL), dtype="bfloat16", max_model_len=1024, max_num_seqs=sequences, enforce_eager=True,
            kv_cache_memory_bytes=256 << 20, attention_config={"backend": "CPU_MLA"}, enable_prefix_caching=False,
            compilation_config={"custom_ops": ["all", "-rotary_embedding"]}, **engine_args,
        )  # fmt: skip

        def clients(model: Any) -> Any:
            return [layer.client for layer in model.modules() if isinstance(layer, RemoteRoutedExperts)]

        self._client = self._llm.apply_model(clients)[0][0]
        self._meter = self._client.meter
        self._sequences = sequences
        self._asked = 0

    def steps(self, count: int, metered: bool) -> float:
        """Seconds per decode step, all sequences running."""
        from vllm import SamplingParams

        self._client.meter = self._meter if metered else None
        engine = self._llm.llm_engine
        for _ in range(self._sequences):
            self._asked += 1
            prompt = {"prompt_token_ids": random.choices(range(10, 250), k=_PROMPT_TOKENS)}
            engine.add_request(str(self._asked), prompt, SamplingParams(max_tokens=count + 4, ignore_eos=True))
        for _ in range(2):  # prefill, and the first step after it
            engine.step()
        began = time.perf_counter()
        for _ in range(count):
            engine.step()
        took = time.perf_counter() - began
        while engine.has_unfinished_requests():
            engine.step()
        return took / count


def _block(plane: ExpertPlane, engine: _Engine, workers: Sequence[WorkerEndpoint], on: bool, steps: int) -> float:
    plane.publish(workers)
    return engine.steps(steps, on)


def _report(with_s: Sequence[float], without_s: Sequence[float], layers: int) -> None:
    added = [1e6 * (one - other) for one, other in zip(with_s, without_s, strict=True)]
    step_us = 1e6 * statistics.median(without_s)
    medians = sorted(statistics.median(random.choices(added, k=len(added))) for _ in range(2000))
    middle, low, high = statistics.median(added), medians[50], medians[-51]
    print(f"decode step without metrics: {step_us / 1e3:.2f} ms ({layers} MoE layers), {len(added)} pairs of blocks")
    print(f"added by metrics: {middle:.0f} us per step [{low:.0f}, {high:.0f}], {middle / layers:.1f} us per layer")
    print(f"share of the step: {middle / step_us:.2%} [{low / step_us:.2%}, {high / step_us:.2%}]; target below 1 %")
    if low / step_us > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
