"""A batcher and its runner on a clock that only their kernel moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.errors import DeepsplitError
from routing.tokens.batcher import Batcher, QueuedRequest
from routing.tokens.fence import Fence
from routing.tokens.turn_runner import TurnRunner
from routing.tokens.wire import DispatchRequest

HIDDEN = 4


class Nobody:
    """An owner that answers go nowhere from."""

    def answer(self, frame: bytes, request_bytes: int) -> None:
        raise AssertionError("the tests of turns answer nobody")


def request(
    layer: int, rows: int = 2, deadline_ms: int = 60_000, dtype: torch.dtype = torch.float32, top_k: int = 1
) -> DispatchRequest:
    """Row t is all t + 1; every row asks for expert 0 with weight 1."""
    hidden_TH = torch.arange(1, rows + 1).unsqueeze(1).expand(rows, HIDDEN).to(dtype)
    ids_TK = torch.zeros(rows, top_k, dtype=torch.int16)
    return DispatchRequest(1, 1, layer, deadline_ms, hidden_TH, ids_TK, torch.ones(rows, top_k), torch.float32)


@dataclass(frozen=True)
class Finished:
    """How a request ended, and when."""

    work: QueuedRequest
    result: torch.Tensor | DeepsplitError
    at: float


class Turns:
    """`kernel(layer, rows)` returns the seconds that a computation takes, or raises; the output is twice the input."""

    def __init__(self, kernel: Callable[[int, int], float], max_rows: int = 1024) -> None:
        self.now = 100.0
        self.batches: list[tuple[int, int]] = []  # (layer, rows)
        self.finished: list[Finished] = []
        self.batcher = Batcher(max_rows)
        self._kernel = kernel
        self.fence = Fence(30.0)
        self.runner = TurnRunner(self._experts, self._finish, lambda: self.now, self.fence)

    def _experts(self, layer: int, hidden_TH: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.batches.append((layer, len(hidden_TH)))
        self.now += self._kernel(layer, len(hidden_TH))
        return hidden_TH * 2

    def _finish(self, work: QueuedRequest, result: torch.Tensor | DeepsplitError) -> None:
        if isinstance(result, DeepsplitError):
            self.batcher.drop(work)
        self.finished.append(Finished(work, result, self.now))

    def add(self, item: DispatchRequest, owner: Nobody | None = None) -> QueuedRequest:
        """A request comes now."""
        work = QueuedRequest(item, owner or Nobody(), 0, self.now)
        self.batcher.add(work)
        return work

    def turn(self) -> None:
        """Compute one turn."""
        self.runner.run(self.batcher.next(self.now))

    def all(self) -> None:
        """Compute until nothing waits."""
        while len(self.batcher):
            self.turn()

    def ended(self, work: QueuedRequest) -> Finished:
        """How that one ended; it must have ended once."""
        (one,) = [finished for finished in self.finished if finished.work is work]
        return one
