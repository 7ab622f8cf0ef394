"""How fast this machine reads memory, beside which a benchmark sets what it reached."""

from __future__ import annotations

import time


def bandwidth_gb_per_s() -> float:
    """Of reading 1 GiB of float32 with torch's threads, best of five. Imports torch when it is called, because callers
    set its environment first.
    """
    import torch

    values, best_s = torch.ones(1 << 28), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - began)
    return values.nbytes / best_s / 1e9
