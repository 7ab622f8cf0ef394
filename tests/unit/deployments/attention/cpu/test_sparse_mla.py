"""Sparse attention and its indexer on one layer's tensors; whole engines are in tests/integration/test_parity.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.attention.cpu import indexer, sparse_mla
from deployments.attention.cpu.indexer import CpuIndexer
from deployments.attention.cpu.paged_rows import BLOCK, PagedRows
from deployments.attention.cpu.sparse_mla import SparseMLAImpl

HEADS, WIDTH, LATENT = 4, 24, 16
LENGTHS, NEW = (7, 40, 33), (7, 3, 1)  # positions and new tokens of three requests


def paged() -> PagedRows:
    tables = torch.tensor([[5, 0, 0], [2, 7, 1], [4, 3, 6]], dtype=torch.int32)
    starts = [0, 7, 10, 11]
    return PagedRows(11, list(LENGTHS), starts, tables, torch.zeros(11, dtype=torch.int64), 3, 11)


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def layer(chosen_TK: torch.Tensor) -> Any:
    made = object.__new__(SparseMLAImpl)
    made.num_heads, made.kv_lora_rank, made.scale = HEADS, LATENT, 0.3
    made._chosen_TK = chosen_TK
    return made


def expected(q_TNC: torch.Tensor, cached_SC: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    rows_KC = cached_SC[chosen]
    return (q_TNC @ rows_KC.T * 0.3).softmax(-1) @ rows_KC[:, :LATENT]


@pytest.mark.parametrize("elements", [16 << 20, 1])  # all rows at once, one by one
def test_each_row_attends_to_what_is_chosen(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(sparse_mla, "_ELEMENTS", elements)
    rows, cache = paged(), drawn(8, BLOCK, WIDTH)
    chosen = torch.full((11, 8), -1, dtype=torch.int32)
    chosen[7:11, :3] = torch.tensor([[0, 17, 37], [38, 1, 2], [39, 20, 19], [32, 0, 16]])
    q = drawn(11, HEADS, WIDTH, seed=1)
    out, _ = layer(chosen).forward_mqa(q, cache, rows, None)
    short = rows.cached(cache, 0, 7)  # no longer than what a token may attend to: all up to itself
    for row in range(7):
        torch.testing.assert_close(out[row], expected(q[row], short, list(range(row + 1))))
    for row, request in ((7, 1), (8, 1), (9, 1), (10, 2)):
        whole = rows.cached(cache, request, LENGTHS[request])
        torch.testing.assert_close(out[row], expected(q[row], whole, chosen[row, :3].tolist()))


@pytest.mark.parametrize("elements", [16 << 20, 1])
def test_the_indexer_chooses_the_best_of_the_positions_so_far(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(indexer, "_ELEMENTS", elements)
    made = object.__new__(CpuIndexer)
    torch.nn.Module.__init__(made)
    made.topk_tokens = 5
    keys, q, weights = drawn(9, 8), drawn(3, 16, 8, seed=1), drawn(3, 16, seed=2)
    chosen = torch.full((3, 5), 99, dtype=torch.int32)
    made._choose(q, weights, keys, chosen)
    for row, own in enumerate((6, 7, 8)):
        scores = (weights[row][:, None] * torch.relu(q[row] @ keys.T)).sum(0)[: own + 1]
        assert set(chosen[row].tolist()) == set(scores.topk(5).indices.tolist())


def test_fewer_positions_than_may_be_chosen_are_all_chosen() -> None:
    made = object.__new__(CpuIndexer)
    torch.nn.Module.__init__(made)
    made.topk_tokens = 6
    chosen = torch.full((8, 6), 99, dtype=torch.int32)
    made._choose(drawn(8, 4, 8), drawn(8, 4, seed=1), drawn(8, 8, seed=2), chosen)
    assert [sorted(row)[-3:] for row in chosen[:3].tolist()] == [[-1, -1, 0], [-1, 0, 1], [0, 1, 2]]


def test_places_follow_the_block_table() -> None:
    assert paged().places(1, torch.tensor([0, 15, 16, 39])).tolist() == [32, 47, 112, 23]
