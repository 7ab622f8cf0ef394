"""Run seeds: `python -m tests.simulation --seeds 1000`. A failing run prints its seed; the seed alone repeats it."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter

import torch

from tests.simulation.world import World


def main() -> None:
    """Exit with 1 if a seed fails."""
    if os.environ.get("PYTHONHASHSEED") != "0":  # or sets have another order in each process
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
                  {**os.environ, "PYTHONHASHSEED": "0"})  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    failed, dispatches, happened, began_s = [], 0, Counter[str](), time.monotonic()
    for seed in range(args.first, args.first + args.seeds):
        world = World(seed)
        try:
            world.run()
        except Exception:
            failed.append(seed)
            print(f"seed {seed} fails after {world.line.now_s - 1000:.2f} s of its time, {dict(world.happened)}:\n"
                  f"{traceback.format_exc()}", flush=True)  # fmt: skip
        happened += world.happened
        dispatches += world.dispatches
    took_s = time.monotonic() - began_s
    print(f"{args.seeds} seeds, {dispatches} dispatches, {took_s:.1f} s; {len(failed)} failed: {failed}")
    print("happened: " + ", ".join(f"{name} {count}" for name, count in sorted(happened.items())))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
