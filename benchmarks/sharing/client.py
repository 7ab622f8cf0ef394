"""The dispatches of one attention replica, in a process of its own: layer after layer, with a pause between them.

Usage: python -m benchmarks.sharing.client SETTINGS_JSON. It says `ready`, starts at a line on stdin, and answers with
its dispatch times in seconds, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cluster.config import DispatchConfig
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile


@dataclass(frozen=True)
class Load:
    """What a client does."""

    placement: str
    model_id: str
    hidden: int
    experts: int
    top_k: int
    layers: tuple[int, ...]
    rows: int  # per dispatch
    pause_s: float  # between two dispatches: the replica's own part of a layer
    seconds: float
    seed: int

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run the load once."""
    load = Load(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(load.seed)
    shape = ExpertShape(load.model_id, load.hidden, load.experts)
    client = ExpertClient(DispatchConfig(), shape, PlacementFile(Path(load.placement)), torch.bfloat16, torch.bfloat16)
    hidden_TH = torch.randn(load.rows, load.hidden, generator=generator).to(torch.bfloat16)
    weights_TK = torch.rand(load.rows, load.top_k, generator=generator)
    ids_TK = [torch.rand(load.rows, load.experts, generator=generator).topk(load.top_k).indices for _ in load.layers]

    def step(times: list[float]) -> None:
        for layer, ids in zip(load.layers, ids_TK, strict=True):
            time.sleep(load.pause_s)
            began = time.perf_counter()
            client.forward(layer, hidden_TH, ids, weights_TK)
            times.append(time.perf_counter() - began)

    for _ in range(5):
        step([])
    print("ready", flush=True)
    sys.stdin.readline()
    times: list[float] = []
    until = time.perf_counter() + load.seconds
    while time.perf_counter() < until:
        step(times)
    print(json.dumps(times), flush=True)
    client.close()


if __name__ == "__main__":
    main()
