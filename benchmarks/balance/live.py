"""A cluster of two expert workers, one of them three times as fast: tokens per second before the balancer's moves, and
after them.

The whole product on a model of 768 M parameters, bfloat16; equal shares at first. The slow worker runs for 1 ms of each
3 (SIGSTOP and SIGCONT). Before: rebalancing is off, and after the same time with `experts.rebalance` on, the moves and
what they were predicted to save are in `deepsplit status`. `python -m benchmarks.balance.live --help`
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.failover.faults import slowed
from benchmarks.measuring.application import Application
from benchmarks.measuring.sse_client import connect
from benchmarks.split_vs_unsplit import SHAPE
from tests.checkpoints import make_checkpoint

_RUNS_S, _STOPS_S = 0.001, 0.002


async def tokens_per_s(url: str, clients: int, warm_up_s: float, seconds: float) -> float:
    """Of completions of 10 to 40 tokens that `clients` ask for without a pause, after a while."""
    done = 0
    until_s = time.monotonic() + warm_up_s + seconds

    async def one() -> None:
        nonlocal done
        async with await connect(url) as connection:
            while time.monotonic() < until_s:
                tokens = random.randint(10, 40)
                body = {"model": "m", "prompt": [10 + at for at in range(8)], "max_tokens": tokens, "ignore_eos": True}
                reply = await connection.request("POST", "/v1/completions", json.dumps(body).encode())
                assert reply.status == 200, reply.body
                if until_s - seconds < time.monotonic() < until_s:
                    done += tokens

    await asyncio.gather(*(one() for _ in range(clients)))
    return done / seconds


def measure(checkpoint: Path, moves: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One cluster, with the balancer or without."""
    config = {
        "model": {"path": str(checkpoint), "name": "m"},
        "attention": {"kv_cache_gib": 0.5, "max_model_len": 1024, "threads": 1},
        "experts": {"workers": 2, "rebalance": {"enabled": moves, "interval_s": 15, "headroom": 0.6}},
    }
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as folder, Application(Path(folder), config) as app:
        status = app.status()
        with slowed(status["experts"][0]["pid"], _RUNS_S, _STOPS_S):
            rate = asyncio.run(tokens_per_s(status["gateway"]["rest"], args.clients, args.warm_up, args.seconds))
        status = app.status()
    held = [sum(map(len, worker["experts"].values())) for worker in status["experts"]]
    return {"moves": moves, "tokens_per_s": rate, "experts_held": held, "last_round": status["rebalanced"]}


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32, help="requests at once")
    parser.add_argument("--warm-up", type=float, default=75.0, help="seconds before it counts, for the moves")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds that count")
    parser.add_argument("--json", action="store_true", help="both sides, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="balance-") as folder:
        checkpoint = Path(folder) / "model"
        make_checkpoint(checkpoint, dataclasses.replace(SHAPE, max_positions=1024), dtype="bfloat16")
        before, after = measure(checkpoint, False, args), measure(checkpoint, True, args)
    if args.json:
        print(json.dumps([before, after]))
        return
    for side in (before, after):
        name = "with moves" if side["moves"] else "equal shares"
        print(f"{name:<14}{side['tokens_per_s']:>8.1f} tokens/s, experts held {side['experts_held']}, last round "
              f"{side['last_round']}")  # fmt: skip
    print(f"ratio {after['tokens_per_s'] / before['tokens_per_s']:.2f}")


if __name__ == "__main__":
    main()
