"""Expert servers in this process, whose experts a test decides, and clients of them; all over real gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from cluster.config import DispatchConfig
from cluster.errors import StalePlacement
from monitoring.dispatch_meter import DispatchMeter
from monitoring.metrics import DispatchMetrics
from routing.tokens.channel import METHOD_PATH, channel_options
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.frame_server import FrameServer, Refusal, Stream
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.server import ExpertServer
from tests.unit.routing.tokens.conftest import EXPERTS, HIDDEN, MODEL, rows

ALL = tuple(range(EXPERTS))


class Experts:
    """Expert e multiplies a row by e + 1. `before` may wait or raise; `asked` has the expert ids of each call."""

    def __init__(self, held: Collection[int] = ALL, before: Callable[[], None] = lambda: None) -> None:
        self.held = set(held)
        self.before = before
        self.asked: list[set[int]] = []

    def __call__(
        self, layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        asked = set(ids_TK[ids_TK >= 0].tolist())
        self.asked.append(asked)
        self.before()
        if not asked <= self.held:
            raise StalePlacement(f"not held here: {asked - self.held}", tuple(asked - self.held))
        return hidden_TH * torch.where(ids_TK >= 0, (ids_TK + 1) * weights_TK, 0.0).sum(1, keepdim=True)


class Raises:
    """Raises each of `errors`, one a call, and nothing afterwards."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = iter(errors)

    def __call__(self) -> None:
        error = next(self._errors, None)
        if error is not None:
            raise error


class LocalPlane:
    """Workers by name, a placement table, and clients with meters."""

    def __init__(self, folder: Path) -> None:
        self.placement = PlacementFile(folder / "placement")
        self.servers: dict[str, ExpertServer] = {}
        self.endpoints: dict[str, WorkerEndpoint] = {}
        self.registry = CollectorRegistry()
        self._ends: list[Callable[[], object]] = []
        self._epoch = 0

    def start(
        self, name: str, experts: Experts, held: Collection[int] = ALL, model: str = MODEL, **settings: object
    ) -> ExpertServer:
        """`held`: what the table says."""
        server = ExpertServer(experts, HIDDEN, model, DispatchConfig.model_validate(settings))
        self.put(name, server.start("127.0.0.1"), held)
        self.servers[name] = server
        self._ends.append(lambda: server.stop(0))
        return server

    def start_stranger(self, name: str, answer: bytes) -> None:
        """A worker that answers every frame with these bytes."""
        handler = _Stranger(answer)
        frames = FrameServer({METHOD_PATH: handler}, channel_options(DispatchConfig()), 8)
        self.put(name, f"127.0.0.1:{frames.listen('127.0.0.1:0', None)}", ALL)

        def poll() -> None:
            while not frames.ended.is_set():
                frames.poll(time.time() + 0.05)

        thread = threading.Thread(target=poll)
        thread.start()

        def end() -> None:
            frames.shut_down()
            frames.cut()
            thread.join()

        self._ends.append(end)

    def put(self, name: str, address: str, held: Collection[int]) -> None:
        """Give a worker its place; `publish` makes it known."""
        self.endpoints[name] = WorkerEndpoint(name, address, {layer: tuple(held) for layer in (1, 2)})

    def publish(self, *names: str) -> None:
        """A new table, of these workers; of all without names."""
        self._epoch += 1
        chosen = names or tuple(self.endpoints)
        self.placement.write(PlacementTable.of(Stamp(1, self._epoch), tuple(self.endpoints[name] for name in chosen)))

    def client(self, **settings: object) -> ExpertClient:
        """A client whose meter writes to `registry`: one per plane."""
        meter = DispatchMeter(DispatchMetrics(self.registry))
        base = {"call_timeout_s": 8, "dispatch_timeout_s": 20, "uncovered_timeout_s": 10}
        config = DispatchConfig.model_validate(base | settings)
        shape = ExpertShape(MODEL, HIDDEN, EXPERTS)
        client = ExpertClient(config, shape, self.placement, torch.float32, torch.float32, meter=meter)
        self._ends.append(client.close)
        return client

    def value(self, client: ExpertClient, name: str, **labels: str) -> float:
        """A metric of the client, 0 if there is none yet."""
        assert client.meter is not None
        client.meter.fold()
        return self.registry.get_sample_value(f"deepsplit_dispatch_{name}", labels) or 0.0

    def close(self) -> None:
        """End all; clients first."""
        for end in reversed(self._ends):
            end()


class _Stranger:
    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def admit(self, metadata: object, auth_context: object) -> Refusal | None:
        return None

    def opened(self, stream: Stream) -> None:
        pass

    def received(self, stream: Stream, frame: bytes) -> None:
        stream.answer(self._answer, len(frame))

    def gone(self, stream: Stream) -> None:
        pass


@contextmanager
def local_plane(folder: Path) -> Iterator[LocalPlane]:
    made = LocalPlane(folder)
    try:
        yield made
    finally:
        made.close()


def forward(client: ExpertClient, count: int = 8, layer: int = 1, seed: int = 0) -> None:
    """One dispatch, whose sum must be right."""
    hidden, ids, weights, expected = rows(count, seed)
    torch.testing.assert_close(client.forward(layer, hidden, ids, weights), expected)
