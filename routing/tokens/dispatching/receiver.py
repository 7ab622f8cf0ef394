"""Takes the replies of a dispatch, and sorts what went wrong into lost rows and errors."""

from __future__ import annotations

import time

import torch

from cluster.config import DispatchConfig
from cluster.errors import DispatchTimeout, StalePlacement, WorkerLost
from routing.tokens.dispatching.links import Links
from routing.tokens.dispatching.loss_book import LossBook
from routing.tokens.dispatching.pace import Pace
from routing.tokens.in_flight import Dispatch, SentPart
from routing.tokens.wire import HEADER_BYTES


class Receiver:
    """Thread-safe."""

    def __init__(
        self, settings: DispatchConfig, links: Links, losses: LossBook, pace: Pace, hidden_size: int
    ) -> None:
        self._call_timeout_s = settings.call_timeout_s
        self._links = links
        self._losses = losses
        self._pace = pace
        self._hidden_size = hidden_size

    def collect(self, dispatch: Dispatch) -> Exception | None:
        """Take every outstanding reply into `dispatch.sum`. Returns the last error that cost rows; `dispatch` keeps
        which. Raises what no repeat can mend; what is then outstanding stays in `dispatch.sent`.
        """
        last: Exception | None = None
        waited_us = queued_us = 0  # of the slowest worker
        away_s: list[tuple[str, float]] = []
        sent_parts = dispatch.sent
        while sent_parts:
            sent = sent_parts[0]
            try:
                queue_us, compute_us = self._take(dispatch, sent)
            except (WorkerLost, StalePlacement, DispatchTimeout) as error:
                last = error
                dispatch.stopwatch.sample.retries.append(error.outcome)
                dispatch.lose(sent.part)
                self._lose(sent, error, dispatch.request_ids)
            except BaseException:
                self._links.discard(sent.worker_id, sent.link)  # it may have refused the whole stream
                raise
            else:
                self._losses.answered(sent.worker_id)
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
        for frame_id, rows in sent.frames:
            timeout_s = min(self._call_timeout_s, dispatch.deadline - time.monotonic())
            reply = sent.link.receive(frame_id, timeout_s)
            if reply.output_TH.shape != (rows, self._hidden_size):
                shape = tuple(reply.output_TH.shape)
                raise WorkerLost(f"expert worker {sent.link.address} answered with shape {shape}")
            pieces.append(reply.output_TH)
            queue_us += reply.queue_us
            compute_us += reply.compute_us
        output_RH = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        watch = dispatch.stopwatch
        nbytes = HEADER_BYTES * len(pieces) + output_RH.nbytes
        watch.reply(sent.worker_id, queue_us / 1e6, compute_us / 1e6, nbytes)
        began = time.monotonic()
        dispatch.sum.add(sent.part.rows_R, output_RH)
        watch.sample.combine_s += time.monotonic() - began
        return queue_us, compute_us

    def _lose(self, sent: SentPart, error: Exception, request_ids: str) -> None:
        if isinstance(error, StalePlacement):  # the worker is well, and so are others' frames on its link
            sent.forget()
            self._losses.lose(sent.worker_id, error, request_ids)
        elif self._links.discard(sent.worker_id, sent.link):
            self._losses.lose(sent.worker_id, error, request_ids)
