"""Splits rows by worker and combines what comes back. Pure functions; the client does the sending.

Legend: T rows (tokens), R rows of one part, H hidden size, K experts per token, E experts of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from routing.tokens.placement import UNCOVERED
from routing.tokens.wire import NO_EXPERT


@dataclass(frozen=True)
class Part:
    """The rows that one worker gets: each row once, however many of its experts that worker holds."""

    worker: int  # index in the placement table
    rows_R: np.ndarray  # int64, ascending
    expert_ids_RK: np.ndarray  # int16, global; NO_EXPERT where the expert is another worker's


@dataclass(frozen=True)
class Split:
    """The result of `split`, which `combine` reads."""

    parts: tuple[Part, ...]
    uncovered: tuple[int, ...]  # experts that are needed and that no usable worker holds


def split(expert_ids_TK: np.ndarray, route_E: np.ndarray) -> Split:
    """Divide the (row, expert) pairs by the worker that `route_E` names.

    `expert_ids_TK` is integer with NO_EXPERT for pairs that need nothing (any more). Pairs of uncovered experts are in
    no part.
    """
    owner_TK = np.where(expert_ids_TK >= 0, route_E[expert_ids_TK], np.int16(UNCOVERED))
    missing_TK = (owner_TK == UNCOVERED) & (expert_ids_TK >= 0)
    uncovered = tuple(np.unique(expert_ids_TK[missing_TK]).tolist()) if missing_TK.any() else ()
    parts = []
    for worker in np.unique(owner_TK).tolist():
        if worker == UNCOVERED:
            continue
        mine_TK = owner_TK == worker
        rows_R = np.flatnonzero(mine_TK.any(axis=1))
        ids_RK = np.where(mine_TK[rows_R], expert_ids_TK[rows_R], NO_EXPERT).astype(np.int16)
        parts.append(Part(worker, rows_R, ids_RK))
    return Split(tuple(parts), uncovered)


def combine(output_TH: torch.Tensor, part: Part, reply_RH: torch.Tensor) -> None:
    """Add one part's reply to `output_TH` (float32) in place."""
    if len(part.rows_R) == len(output_TH):
        output_TH += reply_RH
    else:
        output_TH.index_add_(0, torch.from_numpy(part.rows_R), reply_RH.to(output_TH.dtype))
