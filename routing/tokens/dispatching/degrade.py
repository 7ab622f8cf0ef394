"""Going on without experts that nobody holds: which rows can, by how much the rest counts more, and saying so.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch

from routing.tokens.wire import NO_EXPERT

logger = logging.getLogger(__name__)

_LEAST_WEIGHT = 1e-3  # fraction of a row's weight that must be left when it goes without some experts


class Degradation:
    """The rows of one dispatch that go without some of their experts."""

    def __init__(self, weights_TK: np.ndarray) -> None:
        self._weights_TK = weights_TK
        self._dropped_T = np.zeros(len(weights_TK), dtype=np.float32)  # weight of experts that a row goes without

    @property
    def rows(self) -> int:
        """How many they are."""
        return int((self._dropped_T != 0).sum())

    def without(self, uncovered: tuple[int, ...], remaining_TK: np.ndarray) -> np.ndarray | None:
        """Return `remaining_TK` without these experts in the rows that have others left; None if no row has."""
        missing_TK = np.isin(remaining_TK, uncovered)
        total_T = self._weights_TK.sum(1)
        lost_T = np.where(missing_TK, self._weights_TK, 0.0).sum(1)
        kept_T = total_T - self._dropped_T - lost_T
        droppable_T = (lost_T > 0) & (kept_T > _LEAST_WEIGHT * total_T)
        if not droppable_T.any():
            return None
        self._dropped_T += np.where(droppable_T, lost_T, 0.0).astype(np.float32)
        return np.where(missing_TK & droppable_T[:, None], np.int16(NO_EXPERT), remaining_TK)

    def scaled_up(self, output_TH: torch.Tensor) -> torch.Tensor:
        """Return `output_TH` with the weights of the other experts scaled up: the sum is linear in them."""
        total_T = self._weights_TK.sum(1)
        return output_TH * torch.from_numpy(total_T / (total_T - self._dropped_T)).unsqueeze(1)


class DegradedLately:
    """Whether the process computes rows without some of their experts: for the log and for the replica's report."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._last_s = -math.inf

    def note(self, layer: int, rows: int, request_ids: str, now_s: float) -> None:
        """Record that a dispatch did; the first for a while goes into the log. `now_s`: monotonic."""
        if not self.at(now_s):
            fields = {"request_id": request_ids, "layer": layer, "rows": rows}
            logger.warning("degraded: some rows are computed without all of their experts", extra={"fields": fields})
        self._last_s = now_s

    def at(self, now_s: float) -> bool:
        """Return whether a dispatch did within `memory_s` before `now_s`."""
        return now_s - self._last_s < self._memory_s
