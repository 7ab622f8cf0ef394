"""One MoE layer's rows on their way to the experts and back: what is still missing, and how long each part took.

Legend: T rows (tokens), R rows of one part, H hidden size, K experts per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from monitoring.dispatch_meter import DispatchSample
from routing.tokens.split_combine import Part, combine
from routing.tokens.wire import HEADER_BYTES, NO_EXPERT

_LEAST_WEIGHT = 1e-3  # fraction of a row's weight that must be left when it goes without some experts
_BLOCKED_S = 20e-6  # a reply that took no longer to read than this had arrived before


@dataclass(frozen=True)
class SentPart:
    """One worker's part of a dispatch, sent in as many frames as the message bound asks for."""

    part: Part
    worker_id: str
    frames: tuple[tuple[int, slice], ...]  # (frame id, rows of the part)


@dataclass(frozen=True)
class ReceivedPart:
    """One worker's reply to its part, put together from all frames."""

    output_RH: torch.Tensor
    queue_s: float
    compute_s: float


class InFlight:
    """The state of one dispatch. Not thread-safe."""

    def __init__(
        self, layer: int, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, expert_ids_TK: np.ndarray,
        deadline: float, uncovered_deadline: float,
    ) -> None:  # fmt: skip
        """`weights_TK` float32; `expert_ids_TK` int16, which this object takes over and changes; deadlines in monotonic
        seconds."""
        self.layer = layer
        self.hidden_TH = hidden_TH
        self.weights_TK = weights_TK
        self.remaining_TK = expert_ids_TK  # still to be computed; NO_EXPERT where done
        self.deadline = deadline
        self.uncovered_deadline = uncovered_deadline
        self.sent: list[SentPart] = []
        self.sample = DispatchSample(len(hidden_TH))
        self._output_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32)
        self._dropped_T = np.zeros(len(hidden_TH), dtype=np.float32)  # weight of experts that a row goes without
        self._sent_at = self._meanwhile_at = 0.0  # monotonic seconds
        self._received: list[tuple[float, ReceivedPart]] = []  # with when it came

    @property
    def pending(self) -> bool:
        """Whether something is still to be computed."""
        return bool((self.remaining_TK != NO_EXPERT).any())

    def all_sent(self) -> None:
        """Record that the last frame was handed to gRPC."""
        self._sent_at = time.monotonic()

    def meanwhile_done(self) -> None:
        """Record that the shared expert, which runs while rows are away, is done."""
        self._meanwhile_at = time.monotonic()
        self.sample.shared_s = self._meanwhile_at - self._sent_at

    def take(self, sent: SentPart, received: ReceivedPart) -> None:
        """Add one part's reply to the output."""
        now, sample = time.monotonic(), self.sample
        self._received.append((now, received))
        sample.workers.append((sent.worker_id, received.queue_s + received.compute_s))
        sample.bytes_in += HEADER_BYTES * len(sent.frames) + received.output_RH.nbytes
        combine(self._output_TH, sent.part, received.output_RH)
        rows_R, ids_RK = sent.part.rows_R, sent.part.expert_ids_RK
        self.remaining_TK[rows_R] = np.where(ids_RK >= 0, NO_EXPERT, self.remaining_TK[rows_R])
        sample.combine_s += time.monotonic() - now

    def all_taken(self) -> None:
        """Record that every part came back or was lost: how long the slowest worker took, and how much of the round
        trip is left for the network.
        """
        if not self._received:
            return
        slowest = max((one for _, one in self._received), key=lambda one: one.queue_s + one.compute_s)
        last = max(at for at, _ in self._received)
        self._received.clear()
        sample = self.sample
        sample.wait_s += slowest.queue_s
        sample.compute_s += slowest.compute_s
        if last - self._meanwhile_at > _BLOCKED_S:
            away_s = last - self._sent_at - slowest.queue_s - slowest.compute_s
            sample.return_s = (sample.return_s or 0.0) + max(0.0, away_s)

    def go_without(self, uncovered: tuple[int, ...]) -> bool:
        """Drop these experts from every row that has others left. Returns False if there was no such row."""
        missing_TK = np.isin(self.remaining_TK, uncovered)
        weights_TK = self.weights_TK.numpy()
        lost_T = np.where(missing_TK, weights_TK, 0.0).sum(1)
        kept_T = weights_TK.sum(1) - self._dropped_T - lost_T
        droppable_T = (lost_T > 0) & (kept_T > _LEAST_WEIGHT * weights_TK.sum(1))
        self._dropped_T += np.where(droppable_T, lost_T, 0.0).astype(np.float32)
        self.remaining_TK[missing_TK & droppable_T[:, None]] = NO_EXPERT
        self.sample.degraded_rows = int((self._dropped_T != 0).sum())
        return bool(droppable_T.any())

    def output(self) -> torch.Tensor:
        """The weighted sum, float32 [T, H]. Rows that go without some experts keep their weights' sum: it is linear."""
        if self.sample.degraded_rows:
            total_T = self.weights_TK.sum(1)
            self._output_TH *= (total_T / (total_T - torch.from_numpy(self._dropped_T))).unsqueeze(1)
        return self._output_TH
