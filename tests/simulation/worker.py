"""A virtual expert worker: real frames in, real frames out, experts that compute with whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.errors import DeepsplitError, StalePlacement, WorkerBusy, WorkerFailing
from routing.tokens.membership import WorkerMember
from routing.tokens.placement import NO_TABLE
from routing.tokens.share import Share
from routing.tokens.wire import DispatchReply, DispatchRequest, decode_request, encode_error, encode_reply
from tests.simulation.events import Timeline

if TYPE_CHECKING:
    from tests.simulation.directory import VirtualDirectory

HIDDEN = 8
COMPUTE_S, LOAD_S = 0.002, 0.3


def factor(layer: int, expert: np.ndarray) -> np.ndarray:
    """What experts do: they multiply by this, so that sums are exact and tell experts apart."""
    return 1 + (7 * expert + 3 * layer) % 11


class VirtualWorker:
    """One process. `stopped` it does nothing but keep what comes; dead it does nothing at all."""

    def __init__(self, name: str, slot: int, node: str, share: Share, line: Timeline, random: Random) -> None:
        self.name, self.slot, self.node = name, slot, node
        self.share, self.held = share, dict(share)
        self.line, self.random = line, random
        self.alive, self.stopped, self.ready = True, False, False
        self.slowness, self.failures, self.busy_until_s = 1.0, 0, 0.0
        self.wish_seen = NO_TABLE
        self.loading = False
        self._kept: list[Callable[[], None]] = []

    @property
    def address(self) -> str:
        """Of its port; new with every process, as names are."""
        return f"{self.name}:1"

    def do(self, work: Callable[[], None]) -> None:
        """Do it now, once it runs again, or never."""
        if self.stopped:
            self._kept.append(work)
        elif self.alive:
            work()

    def go_on(self) -> None:
        """Run again after it was stopped."""
        self.stopped = False
        kept, self._kept = self._kept, []
        for work in kept:
            self.do(work)

    def take(self, frame: bytes, answer: Callable[[bytes], None]) -> None:
        """A frame has arrived; `answer` sends one back."""
        request = decode_request(frame, HIDDEN)
        refusal = self._refusal(request)
        if refusal is not None:
            answer(encode_error(request.frame_id, refusal))
            return
        took_s = COMPUTE_S * self.slowness * (0.5 + self.random.random())
        held = {layer: set(ids) for layer, ids in self.held.items()}  # a batch in progress keeps its snapshot
        self.line.after(took_s, lambda: self.do(lambda: answer(encode_reply(_computed(request, held, took_s)))))

    def _refusal(self, request: DispatchRequest) -> DeepsplitError | None:
        ids = set(request.expert_ids_TK.numpy().ravel().tolist()) - {-1}
        absent = tuple(sorted(ids - set(self.held.get(request.layer, ()))))
        if absent:
            return StalePlacement(f"layer {request.layer}: {absent} not held", absent)
        if self.line.now_s < self.busy_until_s:
            return WorkerBusy("queue is full", 0.1)
        if self.failures > 0:
            self.failures -= 1
            return WorkerFailing("kernel failed")
        return None

    def member(self) -> WorkerMember:
        """What it says of itself."""
        state = "ready" if self.ready else "loading"
        return WorkerMember(
            self.name, self.slot, 1, self.node, self.address if self.ready else "", state,  # type: ignore[arg-type]
            held=dict(self.held) if self.ready else {}, share=self.share, elastic=self.ready, expert_bytes=1 << 20,
            free_bytes=1 << 40,
        )  # fmt: skip

    def obey(self, keeps: Share, share: Share, directory: VirtualDirectory) -> None:
        """Drop what is not to be kept, or else load what is, one step at a time, as the real worker does."""
        if self.loading:
            return
        extra = {layer: [e for e in ids if e not in keeps.get(layer, ())] for layer, ids in self.held.items()}
        missing = {layer: [e for e in ids if e not in self.held.get(layer, ())] for layer, ids in keeps.items()}
        if any(extra.values()):
            directory.world.happened["drop"] += 1
            self.held = {layer: tuple(e for e in ids if e not in extra[layer]) for layer, ids in self.held.items()}
        elif any(missing.values()):
            self.loading = True
            beyond = {layer: set(ids) - set(share.get(layer, ())) for layer, ids in missing.items()}
            directory.world.happened["takeover" if any(beyond.values()) else "share grows"] += 1
            self.line.after(LOAD_S, lambda: self.do(lambda: self._loaded(missing, directory)))
            return
        elif self.share == share:
            return
        self.share = share
        directory.ask(self, lambda: directory.register(self))

    def _loaded(self, missing: dict[int, list[int]], directory: VirtualDirectory) -> None:
        self.loading = False
        self.held = {
            layer: tuple(sorted({*self.held.get(layer, ()), *missing.get(layer, ())}))
            for layer in sorted({*self.held, *missing})
        }
        directory.ask(self, lambda: directory.register(self))


def _computed(request: DispatchRequest, held: dict[int, set[int]], took_s: float) -> DispatchReply:
    ids_TK, weights_TK = request.expert_ids_TK.numpy(), request.weights_TK.numpy()
    asked = set(ids_TK.ravel().tolist()) - {-1}
    assert asked <= held[request.layer], "a worker computes what it does not hold"
    factors_TK = np.where(ids_TK >= 0, factor(request.layer, ids_TK), 0)
    scale_T = torch.from_numpy((weights_TK * factors_TK).sum(axis=1, dtype=np.float32))
    output_TH = request.hidden_TH * scale_T[:, None]
    return DispatchReply(request.frame_id, request.epoch, request.layer, 0, int(took_s * 1e6), output_TH)
