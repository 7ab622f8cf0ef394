"""Packs the parts of a dispatch into frames and hands them to the workers' links.

Legend: R rows of one part, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from cluster.config import DispatchConfig
from routing.tokens.clock import REAL_CLOCK, Clock
from routing.tokens.dispatching.links import Links
from routing.tokens.in_flight import Dispatch, SentPart
from routing.tokens.placement import PlacementTable
from routing.tokens.split_combine import Part
from routing.tokens.wire import HEADER_BYTES, MAX_REQUEST_IDS_BYTES, pack_request, row_bytes


class Sender:
    """Thread-safe."""

    def __init__(
        self, settings: DispatchConfig, links: Links, hidden_size: int, dispatch_dtype: torch.dtype,
        combine_dtype: torch.dtype, clock: Clock = REAL_CLOCK,
    ) -> None:  # fmt: skip
        self._links = links
        self._now = clock.monotonic
        self._combine_dtype = combine_dtype
        self._call_timeout_s = settings.call_timeout_s
        self._ids = count(1)
        # Request and reply both stay under the message bound.
        self._row_bytes = max(row_bytes(hidden_size, dtype) for dtype in (dispatch_dtype, combine_dtype))
        self._rows_bytes = (settings.max_message_mib << 20) - HEADER_BYTES - MAX_REQUEST_IDS_BYTES

    def send(self, dispatch: Dispatch, parts: Sequence[Part], table: PlacementTable) -> None:
        """Send all parts; each is in `dispatch.sent` as soon as its first frame may have left. They share a deadline,
        which the frames carry.
        """
        weights_TK, request_ids = dispatch.weights_TK, dispatch.request_ids.encode()
        most = max(1, self._rows_bytes // (self._row_bytes + 6 * weights_TK.shape[1]))
        pack_s = send_s = 0.0
        bytes_out = 0
        began = self._now()
        dispatch.stamp = table.stamp
        dispatch.attempt_deadline = min(began + self._call_timeout_s, dispatch.deadline)
        for part in parts:
            worker = table.workers[part.worker]
            link = self._links.of(worker)
            pieces = _pieces(part, weights_TK, most)
            frames = [(next(self._ids), len(ids_RK)) for _, ids_RK, _ in pieces]
            dispatch.sent.append(SentPart(part, worker.worker_id, link, frames))
            for (frame_id, _), (rows_R, ids_RK, weights_RK) in zip(frames, pieces, strict=True):
                deadline_ms = max(0, int((dispatch.attempt_deadline - began) * 1000))
                frame = pack_request(
                    frame_id, table.stamp.n, dispatch.layer, deadline_ms, dispatch.rows, rows_R, ids_RK, weights_RK,
                    self._combine_dtype, request_ids,
                )  # fmt: skip
                bytes_out += len(frame)
                packed = self._now()
                link.send(frame)
                pack_s += packed - began
                began = self._now()
                send_s += began - packed
        dispatch.sent_at = began
        dispatch.stopwatch.sent(pack_s, send_s, bytes_out)


def _pieces(
    part: Part, weights_TK: np.ndarray, most: int
) -> list[tuple[np.ndarray | None, np.ndarray, np.ndarray]]:
    """Cut a part into pieces of at most `most` rows: (rows or None for all, their expert ids, their weights)."""
    rows_R, ids_RK = part.rows_R, part.expert_ids_RK
    whole = len(rows_R) == len(weights_TK)
    weights_RK = weights_TK if whole else weights_TK.take(rows_R, axis=0)
    if len(rows_R) <= most:
        return [(None if whole else rows_R, ids_RK, weights_RK)]
    cuts = [slice(at, at + most) for at in range(0, len(rows_R), most)]
    return [(rows_R[cut], ids_RK[cut], weights_RK[cut]) for cut in cuts]
