"""Splits rows by worker and sums what comes back. No I/O; the client does the sending.

Legend: T rows (tokens), R rows of one part, N rows of all parts, H hidden size, K experts per token, E experts of the
layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from routing.tokens.dispatching.routes import NOBODY, UNCOVERED
from routing.tokens.wire import NO_EXPERT

# Replies are summed so many bytes at a time: the copy that lays a row's replies side by side stays in the cache.
_PASS_BYTES = 8 << 20
_DEALT_ROWS = 16  # a CPU worker takes 1.3 times as long for so many as for one (benchmarks/expert_kernels.py)
_FEW_WORKERS = 3  # up to so many, a pass per worker (7 us for two) is cheaper than sorting the pairs (20 us)

_FIRST_ROW = np.zeros(1, dtype=np.int64)
_FIRST_ROW.flags.writeable = False  # parts share it


class Part(NamedTuple):
    """The rows that one worker gets: each row once, however many of its experts that worker holds."""

    worker: int  # index in the placement table
    rows_R: np.ndarray  # int64, ascending
    expert_ids_RK: np.ndarray  # int16, global; NO_EXPERT where the expert is another worker's


class Split(NamedTuple):
    """The result of `split`: what each worker gets."""

    parts: tuple[Part, ...]
    uncovered: tuple[int, ...]  # experts that are needed and that no usable worker holds


def split(expert_ids_TK: np.ndarray, route_EQ: np.ndarray, salt: int = 0) -> Split:
    """Divide the (row, expert) pairs by the worker that `route_EQ` (see `Routes.layer`) names.

    `expert_ids_TK` is int16 with NO_EXPERT for pairs that need nothing (any more). Pairs of uncovered experts are in
    no part. Where several workers hold an expert, its rows are dealt out to them, _DEALT_ROWS at a time, from turn
    `salt` on: a holder reads the expert's weights for a few rows in about the time that it takes for one.
    """
    owner_TK = _owners(expert_ids_TK, route_EQ, salt)
    if not owner_TK.size:
        return Split((), ())
    if len(owner_TK) == 1:
        return _split_row(expert_ids_TK, owner_TK)
    workers = int(route_EQ[:-1].max(initial=UNCOVERED)) + 1
    uncovered: tuple[int, ...] = ()
    if owner_TK.min() == UNCOVERED:
        uncovered = tuple(np.unique(expert_ids_TK[owner_TK == UNCOVERED]).tolist())
    if workers <= _FEW_WORKERS:
        return Split(_parts_by_pass(expert_ids_TK, owner_TK, workers), uncovered)
    return Split(_parts_by_sorting(expert_ids_TK, owner_TK), uncovered)


def _owners(expert_ids_TK: np.ndarray, route_EQ: np.ndarray, salt: int) -> np.ndarray:
    turns = route_EQ.shape[1]
    if turns == 1:
        return route_EQ.ravel().take(expert_ids_TK)
    at_TK = expert_ids_TK.astype(np.int32) * turns  # those of NO_EXPERT count from the end, where NOBODY is
    ids_P = expert_ids_TK.ravel()
    if len(expert_ids_TK) > _DEALT_ROWS and np.bincount(ids_P + 1)[1:].max(initial=0) > _DEALT_ROWS:
        at_TK += ((_rank_in_expert(ids_P) // _DEALT_ROWS + salt) % turns).reshape(at_TK.shape)
    else:
        at_TK += salt % turns
    return route_EQ.ravel().take(at_TK)


def _rank_in_expert(ids_P: np.ndarray) -> np.ndarray:
    """Return how many pairs before each have the same expert."""
    order_P = ids_P.argsort(kind="stable")
    sorted_P = ids_P[order_P]
    first_P = sorted_P.searchsorted(sorted_P)
    rank_P = np.empty(len(ids_P), dtype=np.int32)
    rank_P[order_P] = np.arange(len(ids_P)) - first_P
    return rank_P


def _split_row(expert_ids_1K: np.ndarray, owner_1K: np.ndarray) -> Split:
    """A single row, the decode step of one sequence, is quickest in plain Python."""
    ids, owners = expert_ids_1K.tolist()[0], owner_1K.tolist()[0]
    parts = []
    for worker in sorted(set(owners) - {UNCOVERED, NOBODY}):
        ids_1K = [[expert if owner == worker else NO_EXPERT for expert, owner in zip(ids, owners, strict=True)]]
        parts.append(Part(worker, _FIRST_ROW, np.array(ids_1K, dtype=np.int16)))
    uncovered = {expert for expert, owner in zip(ids, owners, strict=True) if owner == UNCOVERED}
    return Split(tuple(parts), tuple(sorted(uncovered)))


def _parts_by_pass(expert_ids_TK: np.ndarray, owner_TK: np.ndarray, workers: int) -> tuple[Part, ...]:
    parts = []
    for worker in range(workers):
        others_TK = owner_TK != worker
        none_T = np.logical_and.reduce(others_TK, axis=1)
        ids_TK = expert_ids_TK.copy()
        ids_TK[others_TK] = NO_EXPERT
        if not np.logical_or.reduce(none_T):
            parts.append(Part(worker, np.arange(len(ids_TK)), ids_TK))
        elif len(rows_R := (~none_T).nonzero()[0]):
            parts.append(Part(worker, rows_R, ids_TK[rows_R]))
    return tuple(parts)


def _parts_by_sorting(expert_ids_TK: np.ndarray, owner_TK: np.ndarray) -> tuple[Part, ...]:
    """The pairs are sorted by owner once, so the cost hardly depends on the number of workers."""
    top_k = expert_ids_TK.shape[1]
    owner_P = owner_TK.ravel()
    order_P = owner_P.argsort(kind="stable")  # by worker, then by row
    owner_P = owner_P[order_P]
    begin, end = owner_P.searchsorted((0, NOBODY)).tolist()
    if begin == end:
        return ()
    owner_P, order_P = owner_P[begin:end], order_P[begin:end]
    row_P = order_P // top_k
    # A new row of a part begins where the row or the worker changes.
    new_P = np.empty(len(row_P), dtype=bool)
    new_P[0] = True
    np.not_equal(row_P[1:], row_P[:-1], out=new_P[1:])
    new_P[1:] |= owner_P[1:] != owner_P[:-1]
    slot_P = new_P.cumsum()
    slot_P -= 1
    rows_N, owner_N = row_P[new_P], owner_P[new_P]
    ids_NK = np.full((len(rows_N), top_k), NO_EXPERT, dtype=np.int16)
    ids_NK[slot_P, order_P - row_P * top_k] = expert_ids_TK.ravel()[order_P]
    cuts = [0, *((owner_N[1:] != owner_N[:-1]).nonzero()[0] + 1).tolist(), len(owner_N)]
    workers = owner_N[cuts[:-1]].tolist()
    return tuple(
        Part(worker, rows_N[at:end], ids_NK[at:end])
        for worker, at, end in zip(workers, cuts[:-1], cuts[1:], strict=True)
    )


class RowSum:
    """The sum over replies, in float32, rounded once; over them in the order of `add`."""

    def __init__(self, rows: int, hidden: int) -> None:
        self._shape = (rows, hidden)
        self._replies: list[tuple[np.ndarray, torch.Tensor]] = []

    def add(self, rows_R: np.ndarray, reply_RH: torch.Tensor) -> None:
        """Add one worker's reply to the rows `rows_R` (ascending). The tensor must not change afterwards."""
        self._replies.append((rows_R, reply_RH))

    def total(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the sum in `dtype` [T, H], nought where no reply had the row; memory of its own."""
        replies, (rows, _) = self._replies, self._shape
        if len(replies) <= 2 and all(len(rows_R) == rows for rows_R, _ in replies):
            if not replies:
                return torch.zeros(self._shape, dtype=dtype)
            if len(replies) == 1:
                return replies[0][1].to(dtype, copy=True)
            if replies[0][1].dtype == replies[1][1].dtype == dtype:
                return torch.add(replies[0][1], replies[1][1])  # adds in float32 and rounds once
        passes = -(-sum(reply_RH.nbytes for _, reply_RH in replies) // _PASS_BYTES)
        if passes <= 1:
            return _sum_of(replies, rows, dtype)
        total_TH = torch.empty(self._shape, dtype=dtype)
        step = -(-rows // passes)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            cuts = [(rows_R, reply_RH, *rows_R.searchsorted((begin, end)).tolist()) for rows_R, reply_RH in replies]
            some = [(rows_R[at:to] - begin, reply_RH[at:to]) for rows_R, reply_RH, at, to in cuts]
            total_TH[begin:end] = _sum_of(some, end - begin, dtype)
        return total_TH


def _sum_of(replies: list[tuple[np.ndarray, torch.Tensor]], rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Row by row: `embedding_bag` sums 16-bit rows in float32 registers and rounds the sum once."""
    rows_N = np.concatenate([rows_R for rows_R, _ in replies])
    order_N = rows_N.argsort(kind="stable")
    begin_T = rows_N[order_N].searchsorted(np.arange(rows))
    reply_NH = torch.cat([reply_RH for _, reply_RH in replies])
    if reply_NH.dtype != dtype:
        reply_NH = reply_NH.to(torch.float32)
    sum_TH: torch.Tensor = torch.embedding_bag(reply_NH, torch.from_numpy(order_N), torch.from_numpy(begin_T))[0]
    return sum_TH.to(dtype)
