"""One MoE layer's rows on their way to the experts and back: what is sent, what came, what is still missing.

Legend: T rows (tokens), R rows of one part, H hidden size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from routing.tokens.dispatching.degrade import Degradation
from routing.tokens.dispatching.setbacks import Setbacks
from routing.tokens.dispatching.stopwatch import Stopwatch
from routing.tokens.link import WorkerLink
from routing.tokens.placement import NO_TABLE
from routing.tokens.split_combine import Part, RowSum
from routing.tokens.wire import NO_EXPERT, WireRows


class SentPart(NamedTuple):
    """One worker's part of a dispatch, sent in as many frames as the message bound asks for."""

    part: Part
    worker_id: str
    link: WorkerLink  # the one that it was sent on; by now the worker may have another
    frames: Sequence[tuple[int, int]]  # (frame id, number of rows), in the order of the part's rows

    def forget(self) -> None:
        """Have replies that nobody will take thrown away when they come."""
        for frame_id, _ in self.frames:
            self.link.forget(frame_id)


class Dispatch:
    """A begun dispatch: what `ExpertClient.begin` returns and `finish` takes. Of one thread at a time.

    One that is dropped without `finish` leaves what it has sent in `abandoned`, for the watchdog to forget.
    """

    __slots__ = (
        "_abandoned", "_lost", "attempt_deadline", "deadline", "degradation", "expert_ids_TK", "hidden_dtype", "layer",
        "queue_s", "remaining_TK", "request_ids", "rows", "salt", "sent", "sent_at", "setbacks", "stamp", "stopwatch",
        "sum", "weights_TK",
    )  # fmt: skip

    def __init__(
        self, layer: int, hidden_TH: torch.Tensor, rows: WireRows, weights_TK: np.ndarray, expert_ids_TK: np.ndarray,
        request_ids: str, salt: int, deadline: float, stopwatch: Stopwatch, abandoned: SimpleQueue[SentPart],
    ) -> None:  # fmt: skip
        """`weights_TK` float32; `expert_ids_TK` int16, the router's choice; `salt` as `split` takes it; `deadline` in
        monotonic seconds.
        """
        self.layer = layer
        self.hidden_dtype = hidden_TH.dtype
        self.rows = rows
        self.weights_TK = weights_TK
        self.expert_ids_TK = expert_ids_TK
        self.remaining_TK = expert_ids_TK  # to be sent; NO_EXPERT where nothing is. Replaced, never changed
        self.request_ids = request_ids
        self.salt = salt
        self.deadline = deadline
        self.attempt_deadline = deadline  # of all that is in `sent`; set when it is sent
        self.sent_at = 0.0  # monotonic seconds, when all of it was
        self.stamp = NO_TABLE  # of the table by which it was sent
        self.stopwatch = stopwatch
        self.sent: list[SentPart] = []
        self.sum = RowSum(*hidden_TH.shape)
        self.queue_s = 0.0  # that rows waited at their slowest worker
        self.degradation: Degradation | None = None  # set when rows go without some of their experts
        self.setbacks: Setbacks | None = None  # set when a worker refuses
        self._lost: list[Part] = []
        self._abandoned = abandoned

    def __del__(self) -> None:
        # A queue whose `put` may interrupt itself: the garbage collector runs anywhere, also while a link is locked.
        for sent in self.sent:
            self._abandoned.put(sent)

    @property
    def pending(self) -> bool:
        """Whether parts were lost and must be sent again."""
        return bool(self._lost)

    def lose(self, part: Part) -> None:
        """Record that a part will not come back."""
        self._lost.append(part)

    def send_again(self) -> None:
        """Make the pairs of the lost parts, and no others, those that remain to be sent."""
        remaining_TK = np.full_like(self.expert_ids_TK, NO_EXPERT)
        for part in self._lost:
            ids_RK = part.expert_ids_RK
            remaining_TK[part.rows_R] = np.where(ids_RK >= 0, ids_RK, remaining_TK[part.rows_R])
        self.remaining_TK = remaining_TK
        self._lost.clear()

    def go_without(self, uncovered: tuple[int, ...]) -> bool:
        """Drop these experts from every row that has others left. Returns False if there was no such row."""
        if self.degradation is None:
            self.degradation = Degradation(self.weights_TK)
        kept_TK = self.degradation.without(uncovered, self.remaining_TK)
        if kept_TK is None:
            return False
        self.remaining_TK = kept_TK
        return True

    def met(self) -> Setbacks:
        """The dispatch's setbacks, from the first one on."""
        if self.setbacks is None:
            self.setbacks = Setbacks()
        return self.setbacks

    @property
    def degraded_rows(self) -> int:
        """Rows that go without some of their experts."""
        return 0 if self.degradation is None else self.degradation.rows

    def output(self, dtype: torch.dtype) -> torch.Tensor:
        """The weighted sum [T, H] of all that came. Rows that go without some experts keep their weights' sum."""
        if not self.degraded_rows:
            return self.sum.total(dtype)
        assert self.degradation is not None
        return self.degradation.scaled_up(self.sum.total(torch.float32)).to(dtype)
