"""Takes the replies of a dispatch, and judges what went wrong: of the worker, of this dispatch, or of both.

Each kind has its own remedy; rows that did not come are always split again, by what is then known:

| error | the worker | its link |
|---|---|---|
| WorkerLost, WorkerSilent | lost: no rows for a while | closed |
| WorkerLate | late: no rows for a moment, while others have its experts | stays |
| WorkerUnusable, WorkerFailing (fenced) | set aside | closed when unusable |
| StalePlacement | these experts are not asked there before the next table | stays |
| WorkerBusy, WorkerFailing | this dispatch asks there again after a pause, if it must | stays |
| FrameError | this dispatch does not ask there again | stays |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cluster.config import DispatchConfig
from cluster.errors import (
    DeepsplitError,
    ElsewhereError,
    FrameError,
    StalePlacement,
    WorkerBusy,
    WorkerFailing,
    WorkerLate,
    WorkerLost,
    WorkerSilent,
    WorkerUnusable,
)
from routing.tokens.clock import REAL_CLOCK, Clock
from routing.tokens.dispatching.fault_book import FaultBook
from routing.tokens.dispatching.lateness import Lateness
from routing.tokens.dispatching.links import Links
from routing.tokens.dispatching.pace import Pace
from routing.tokens.in_flight import Dispatch, SentPart
from routing.tokens.wire import HEADER_BYTES, NO_EXPERT, DispatchReply


class Receiver:
    """Thread-safe."""

    def __init__(
        self, settings: DispatchConfig, links: Links, faults: FaultBook, pace: Pace, hidden_size: int,
        elsewhere: Callable[[Dispatch, SentPart], bool], clock: Clock = REAL_CLOCK,
    ) -> None:  # fmt: skip
        """`elsewhere`: whether other workers could compute a part that was sent."""
        self._pause_s = settings.reconnect_interval_s
        self._lateness = Lateness(settings.hedge_after_s)
        self._elsewhere = elsewhere
        self._now = clock.monotonic
        self._links = links
        self._faults = faults
        self._pace = pace
        self._hidden_size = hidden_size

    def collect(self, dispatch: Dispatch) -> DeepsplitError | None:
        """Take every outstanding reply into `dispatch.sum`. Returns the last error that cost rows; `dispatch` keeps
        which. Raises what no repeat can mend; what is then outstanding stays in `dispatch.sent`.
        """
        last: DeepsplitError | None = None
        waited_us = queued_us = 0  # of the slowest worker
        away_s: list[tuple[str, float]] = []
        sent_parts = dispatch.sent
        while sent_parts:
            sent = sent_parts[0]
            try:
                queue_us, compute_us = self._take(dispatch, sent)
            except (ElsewhereError, FrameError) as error:
                last = error
                dispatch.stopwatch.sample.retries.append(error.outcome)
                dispatch.lose(sent.part)
                sent.forget()
                self._judge(dispatch, sent, error)
            else:
                self._faults.answered(sent.worker_id)
                self._lateness.answered(len(sent.part.rows_R), self._now() - dispatch.sent_at)
                away_s.append((sent.worker_id, (queue_us + compute_us) / 1e6))
                if queue_us + compute_us > waited_us:
                    waited_us, queued_us = queue_us + compute_us, queue_us
            del sent_parts[0]
        dispatch.queue_s += queued_us / 1e6
        self._pace.answered(away_s)
        dispatch.stopwatch.collected()
        return last

    def _take(self, dispatch: Dispatch, sent: SentPart) -> tuple[int, int]:
        pieces, queue_us, compute_us = [], 0, 0
        late_at = dispatch.sent_at + self._lateness.late_after_s(len(sent.part.rows_R))
        for frame_id, rows in sent.frames:
            reply = self._receive(dispatch, sent, frame_id, late_at)
            if reply.output_TH.shape != (rows, self._hidden_size):
                shape = tuple(reply.output_TH.shape)
                raise WorkerUnusable(f"expert worker {sent.link.address} answered with shape {shape}")
            pieces.append(reply.output_TH)
            queue_us += reply.queue_us
            compute_us += reply.compute_us
        output_RH = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        watch = dispatch.stopwatch
        nbytes = HEADER_BYTES * len(pieces) + output_RH.nbytes
        watch.reply(sent.worker_id, queue_us / 1e6, compute_us / 1e6, nbytes)
        began = self._now()
        dispatch.sum.add(sent.part.rows_R, output_RH)
        watch.sample.combine_s += self._now() - began
        return queue_us, compute_us

    def _receive(self, dispatch: Dispatch, sent: SentPart, frame_id: int, late_at: float) -> DispatchReply:
        """Wait for a reply; once it is late, only if nobody else can compute the part, or too many were late."""
        if late_at < dispatch.attempt_deadline:
            try:
                return sent.link.receive(frame_id, late_at - self._now(), give_up=False)
            except WorkerSilent:
                if self._elsewhere(dispatch, sent) and self._lateness.spend():
                    waited_s = self._now() - dispatch.sent_at
                    raise WorkerLate(
                        f"expert worker {sent.link.address} takes longer than usual ({waited_s:.2f} s)"
                    ) from None
        return sent.link.receive(frame_id, dispatch.attempt_deadline - self._now())

    def _judge(self, dispatch: Dispatch, sent: SentPart, error: DeepsplitError) -> None:
        worker_id, now_s = sent.worker_id, self._now()
        if isinstance(error, WorkerSilent) and dispatch.attempt_deadline >= dispatch.deadline:
            return  # the dispatch is over, but the worker did not have all of its time
        if isinstance(error, WorkerLost):
            if self._links.discard(worker_id, sent.link):  # else somebody else saw it first, and said so
                self._faults.lost(worker_id, error, dispatch.request_ids)
            return
        if isinstance(error, WorkerLate):
            self._faults.late(worker_id, error, dispatch.request_ids)
            return
        if isinstance(error, WorkerUnusable):
            self._links.discard(worker_id, sent.link)
            self._faults.set_aside(worker_id, error, dispatch.request_ids)
            return
        self._faults.answered(worker_id)
        if isinstance(error, StalePlacement):
            asked = set(sent.part.expert_ids_RK.ravel().tolist()) - {NO_EXPERT}
            experts = asked.intersection(error.experts) or asked  # a worker of an older version does not say which
            self._faults.stale(worker_id, dispatch.layer, experts, dispatch.stamp, error, dispatch.request_ids)
        elif isinstance(error, WorkerBusy):
            dispatch.met().busy(worker_id, error.queue_s, self._pause_s, now_s)
        elif isinstance(error, WorkerFailing) and error.fenced:
            self._faults.set_aside(worker_id, error, dispatch.request_ids)
        elif isinstance(error, WorkerFailing):
            dispatch.met().failed(worker_id, self._pause_s, error, now_s)
        else:
            assert isinstance(error, FrameError)
            dispatch.met().refused[worker_id] = error
