"""Five clients at five layers of 50 ms each, on one worker: when does each get its answer?"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.sharing.flat_combining import FlatCombiningServer
from cluster.config import DispatchConfig
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.server import ExpertServer

CLIENTS = 5
HIDDEN, EXPERTS = 64, 8
COMPUTE_S = 0.05
_MODEL = "bench"
_SETTINGS = DispatchConfig()


@dataclass(frozen=True)
class AnswerTimes:
    """Median over the rounds of the first, second, ... answer, in ms."""

    former_ms: tuple[float, ...]  # by flat combining
    turns_ms: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Of the mean answer times."""
        return statistics.fmean(self.turns_ms) / statistics.fmean(self.former_ms)


def _experts(layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    time.sleep(COMPUTE_S)  # a kernel leaves the interpreter to the other threads, too
    return hidden_TH


def _serve(pipe: Connection, former: bool) -> None:
    server = (
        FlatCombiningServer(_experts, HIDDEN, _SETTINGS) if former
        else ExpertServer(_experts, HIDDEN, _MODEL, _SETTINGS)
    )  # fmt: skip
    pipe.send(server.start("127.0.0.1"))
    pipe.recv()
    server.stop(0)


class _Clients:
    """One client per layer of one worker, and one more, at a layer of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        placement = PlacementFile(folder / "placement")
        held = {layer: tuple(range(EXPERTS)) for layer in range(CLIENTS + 1)}
        placement.write(PlacementTable.of(Stamp(1, 1), (WorkerEndpoint("w", address, held),)))
        shape = ExpertShape(_MODEL, HIDDEN, EXPERTS)
        self._clients = [
            ExpertClient(_SETTINGS, shape, placement, torch.float32, torch.float32) for _ in range(CLIENTS + 1)
        ]
        for layer in range(CLIENTS + 1):
            self._dispatch(layer)

    def _dispatch(self, layer: int) -> float:
        hidden_TH, ids_TK = torch.zeros(8, HIDDEN), torch.arange(EXPERTS).repeat(8, 1)
        self._clients[layer].forward(layer, hidden_TH, ids_TK, torch.ones(8, EXPERTS))
        return time.perf_counter()

    def answers_s(self, busy: bool) -> list[float]:
        """When all dispatch at once, the answer times in their order.

        `busy`: while the worker computes for the one more; its answer is then when time begins.
        """
        barrier = threading.Barrier(CLIENTS + 1)

        def one(layer: int) -> float:
            barrier.wait()
            return self._dispatch(layer)

        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            answers = [pool.submit(one, layer) for layer in range(CLIENTS)]
            before = pool.submit(self._dispatch, CLIENTS) if busy else None
            time.sleep(COMPUTE_S / 2)
            began = time.perf_counter()
            barrier.wait()
            if before is not None:
                began = before.result()
            return sorted(answer.result() - began for answer in answers)

    def close(self) -> None:
        """End their connections."""
        for client in self._clients:
            client.close()


def five_layers(rounds: int) -> dict[str, AnswerTimes]:
    """Both ways in turn, on a worker that is idle when the five come, and on one that is busy."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        clients, pipes, processes = [], [], []
        for former in (True, False):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, former), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
            (at := Path(folder) / str(former)).mkdir()
            clients.append(_Clients(ours.recv(), at))
        made = {
            name: AnswerTimes(*_medians_ms([[way.answers_s(busy) for way in clients] for _ in range(rounds)]))
            for name, busy in (("idle", False), ("busy", True))
        }
        for way in clients:
            way.close()
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("end")
            process.join(30)
    return made


def _medians_ms(rounds: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, ...]]:
    """[round][way][answer] seconds -> [way][answer] milliseconds."""
    return [
        tuple(1e3 * statistics.median(answer) for answer in zip(*of_way, strict=True))
        for of_way in zip(*rounds, strict=True)
    ]
