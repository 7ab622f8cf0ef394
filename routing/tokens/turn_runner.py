"""Computes one turn of the batcher and hands out what came of it.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from cluster.errors import DeepsplitError, WorkerBusy, WorkerFailing
from monitoring.expert_meter import BatchSample, ExpertMeter
from routing.tokens.batcher import QueuedRequest, Slice, Turn
from routing.tokens.fence import Fence
from routing.tokens.request_ids import join_request_ids

logger = logging.getLogger(__name__)

# (layer, hidden_TH, expert_ids_TK int16 with -1 unused, weights_TK float32) -> output_TH in any floating dtype, valid
# until the next call
ComputeExperts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Called once per request, with its output_TH in the reply's dtype or its error.
Finish = Callable[[QueuedRequest, torch.Tensor | DeepsplitError], None]


class TurnRunner:
    """Not thread-safe: one thread computes."""

    def __init__(
        self, experts: ComputeExperts, finish: Finish, clock: Callable[[], float], fence: Fence,
        meter: ExpertMeter | None = None,
    ) -> None:  # fmt: skip
        """`fence` hears how each turn went."""
        self._experts = experts
        self._fence = fence
        self._finish = finish
        self._clock = clock
        self._meter = meter
        self.busy_s = 0.0  # seconds in which experts were computed, so far

    def run(self, turn: Turn) -> None:
        """Compute the turn and finish the requests of which it was the last, and those that fail or came too late."""
        for work in turn.expired:
            waited_s = self._clock() - work.arrived
            self._finish(work, WorkerBusy("the caller's deadline passed before the experts were free", waited_s))
        if not turn.slices:
            return
        error = self._compute(turn.slices, turn.rows)
        if error is None:
            return
        errors = [error]
        if len(turn.slices) > 1:  # one bad request must not fail those that shared its batch
            errors = [failed for part in turn.slices if (failed := self._alone(part)) is not None]
        else:
            self._finish(turn.slices[0].work, error)
        broken = [failed.__cause__ for failed in errors if failed.__cause__ is not None]
        if len(errors) == len(turn.slices) and broken:
            self._fence.failed(broken[-1])

    def _alone(self, part: Slice) -> DeepsplitError | None:
        """Compute one request's slice by itself; returns the error with which it was finished, if it was."""
        failed = self._compute([part], part.last - part.first)
        if failed is not None:
            self._finish(part.work, failed)
        return failed

    def _compute(self, slices: list[Slice], rows: int) -> DeepsplitError | None:
        first = slices[0].work.request
        layer, shape = first.layer, (rows, first.hidden_TH.shape[1])
        started = self._clock()
        try:
            if len(slices) == 1:
                output_TH = self._experts(layer, *_inputs(slices[0]))
            else:
                output_TH = self._experts(layer, *map(torch.cat, zip(*map(_inputs, slices), strict=True)))
            if output_TH.shape != shape:
                raise ValueError(f"the experts returned {list(output_TH.shape)} for {list(shape)}")
        except DeepsplitError as error:
            return error
        except Exception as error:  # the worker lives on, whatever a kernel raises
            failed = WorkerFailing(f"expert computation failed: {error!r}")
            failed.__cause__ = error  # the kernel's own, which tells it from a refusal
            return failed
        took_s = self._clock() - started
        self.busy_s += took_s
        self._fence.computed(took_s)
        if self._meter is not None:
            queued = tuple(part.work.started - part.work.arrived for part in slices if part.ends)
            self._meter.batch(BatchSample(rows, took_s, queued))
        if logger.isEnabledFor(logging.DEBUG):
            _log_batch(layer, slices, took_s)
        pieces = [output_TH] if len(slices) == 1 else output_TH.split([part.last - part.first for part in slices])
        for part, piece_TH in zip(slices, pieces, strict=True):
            try:
                self._take(part, piece_TH, took_s)
            except Exception as error:  # such as no memory for a large reply: the others get theirs
                failed = WorkerFailing(f"a reply could not be made: {error!r}")
                failed.__cause__ = error
                self._finish(part.work, failed)
        return None

    def _take(self, part: Slice, piece_TH: torch.Tensor, took_s: float) -> None:
        work = part.work
        work.compute_s += took_s
        if part.first == 0 and part.ends:
            self._finish(work, piece_TH.to(work.request.reply_dtype))
            return
        if work.output_TH is None:
            work.output_TH = torch.empty(work.rows, piece_TH.shape[1], dtype=work.request.reply_dtype)
        work.output_TH[part.first : part.last] = piece_TH
        if part.ends:
            self._finish(work, work.output_TH)


def _inputs(part: Slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    request, rows = part.work.request, slice(part.first, part.last)
    if part.first == 0 and part.ends:
        return request.hidden_TH, request.expert_ids_TK, request.weights_TK
    return request.hidden_TH[rows], request.expert_ids_TK[rows], request.weights_TK[rows]


def _log_batch(layer: int, slices: list[Slice], took_s: float) -> None:
    works = [part.work for part in slices]
    fields = {
        "request_id": join_request_ids(dict.fromkeys(work.request.request_ids for work in works)),
        "layer": layer,
        "rows": sum(part.last - part.first for part in slices),
        "requests": len(works),
        "queue_us": int(max(work.started - work.arrived for work in works) * 1e6),
        "compute_us": int(took_s * 1e6),
    }
    logger.debug("batch computed", extra={"fields": fields})
