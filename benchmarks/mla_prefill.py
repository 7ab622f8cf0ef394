"""A prompt's latent attention on CPU: ours, in memory linear in the prompt, against vLLM's, which holds all scores.

Both compute the same layer on the same random prompt, float32, in turn, each in a process of its own whose peak memory
counts from before the call. `python -m benchmarks.mla_prefill --help`
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

_SIDES = ("vllm", "ours")
_NOPE, _ROPE, _VALUE = 128, 64, 128  # DeepSeek-V3's widths


def measure(side: str, tokens: int, heads: int, threads: int) -> dict[str, float]:
    """Seconds and peak MiB of one call; its mean absolute output, to see that both compute the same."""
    import torch

    from deployments.attention.cpu.mla_prefill import LinearMemoryPrefill
    from deployments.attention.vllm_internals import CPUSDPAMLAPrefillBackend

    torch.set_num_threads(threads)
    backend = object.__new__(LinearMemoryPrefill if side == "ours" else CPUSDPAMLAPrefillBackend)
    backend.scale = (_NOPE + _ROPE) ** -0.5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, heads, _NOPE + _ROPE, generator=generator) for _ in range(2))
    v = torch.randn(tokens, heads, _VALUE, generator=generator)
    starts = torch.tensor([0, tokens])
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.perf_counter()
    out = backend._ragged_sdpa(q, k, v, starts, starts, True, False)
    took_s = time.perf_counter() - began_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": took_s, "mib": (peak_kib - before_kib) / 1024, "mean": float(out.abs().mean())}


def main() -> None:
    """Run both sides and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="lengths of the prompt")
    parser.add_argument("--heads", type=int, default=8, help="attention heads; DeepSeek-V3 has 128")
    parser.add_argument("--threads", type=int, default=2, help="compute threads")
    parser.add_argument("--json", action="store_true", help="every value, as JSON")
    parser.add_argument("--side", choices=_SIDES, help=argparse.SUPPRESS)  # this process measures
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.tokens[0], args.heads, args.threads)))
        return
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        row: dict[str, Any] = {"tokens": tokens}
        for side in _SIDES:
            command = [sys.executable, "-m", "benchmarks.mla_prefill", "--side", side, "--tokens", str(tokens),
                       "--heads", str(args.heads), "--threads", str(args.threads)]  # fmt: skip
            row[side] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'tokens':>7}{'vLLM, s':>9}{'ours, s':>9}{'ratio':>7}{'vLLM, MiB':>11}{'ours, MiB':>11}")
    for row in rows:
        theirs, ours = row["vllm"], row["ours"]
        print(f"{row['tokens']:>7}{theirs['seconds']:>9.2f}{ours['seconds']:>9.2f}"
              f"{ours['seconds'] / theirs['seconds']:>7.2f}{theirs['mib']:>11.0f}{ours['mib']:>11.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
