"""Real expert servers in real processes for the dispatch tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.plane_state import ExpertPlaneFile

HIDDEN, EXPERTS, MODEL = 32, 8, "test-model"


class Cluster:
    """Worker processes, a placement file, and a client that reads it."""

    def __init__(self, folder: Path) -> None:
        self.placement = PlacementFile(folder / "placement")
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.endpoints: dict[str, WorkerEndpoint] = {}
        self._clients: list[ExpertClient] = []
        self._epoch = 0

    def start(
        self, name: str, held: list[int], delay_s: float = 0.0, model: str = MODEL, tls: InternalTlsConfig | None = None
    ) -> WorkerEndpoint:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.routing.tokens.worker_process", ",".join(map(str, held)), str(delay_s),
             str(HIDDEN), model, *([tls.model_dump_json()] if tls else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("127.0.0.1:")
        self.processes[name] = process
        self.endpoints[name] = WorkerEndpoint(name, address, {layer: tuple(held) for layer in (1, 2, 99)})
        return self.endpoints[name]

    def publish(self, *names: str) -> None:
        self._epoch += 1
        self.placement.write(PlacementTable.of(Stamp(1, self._epoch), tuple(self.endpoints[name] for name in names)))

    def client(
        self, tls: InternalTlsConfig | None = None, plane_file: ExpertPlaneFile | None = None, **settings: object
    ) -> ExpertClient:
        config = DispatchConfig.model_validate(
            {"keepalive_interval_s": 1.0, "keepalive_timeout_s": 1.0, "uncovered_timeout_s": 10} | settings
        )
        shape = ExpertShape(MODEL, HIDDEN, EXPERTS)
        dtype = getattr(torch, config.dispatch_dtype, torch.float32)
        client = ExpertClient(config, shape, self.placement, dtype, torch.float32, tls, plane_file)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_TH, expert_ids_TK, weights_TK and the expected output."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(count)])
    weights = torch.rand(count, 3, generator=generator)
    return hidden, ids, weights, hidden * ((ids + 1) * weights).sum(1, keepdim=True)
