"""Experts that got many rows, computed on the packed weights in slices of the hidden size.

`fused_experts_cpu` multiplies a tile of rows with a block of weights over the whole hidden size: at 7168 neither fits
the processor's second cache beside the other, and it reaches 0.6 of what it does at 2048 (docs/performance.md). A block
of 32 rows of packed weights (packing.py) is contiguous along the hidden size, so a slice of it is a packed block of its
own, which vLLM's `bmm_cpu` multiplies. The partial products are bfloat16 and summed in float32: with random weights the
relative error of a result is 0.0038, where a bfloat16 GEMM per expert has 0.0039 and the fused kernel 0.0029.

Legend: T tokens, P pairs of token and expert, R rows of one expert, H hidden size, I intermediate size; a weight is B
blocks of 32 output rows, each of S slices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from deployments.experts.kernels import Pairs, fused_experts, run_fused, sum_by_token
from deployments.experts.packing import BLOCK_ROWS
from deployments.experts.weights import LayerExperts

_LONGEST = 2048  # columns of a slice: from here on the rate falls (cache of 1 MiB per core)
_LEAST_COLUMNS = 32  # a slice is a multiple of these
_CHUNK = 256  # rows computed at once: their partial products take 32 MiB at DeepSeek-V3's sizes


def slices_of(columns: int) -> int:
    """Return into how many slices a weight of so many columns is cut; 1: it is short enough, or cannot be cut."""
    slices = 1
    while columns > slices * _LONGEST or columns % (slices * _LEAST_COLUMNS):
        slices += 1
        if columns < slices * _LEAST_COLUMNS:
            return 1
    return slices


def few_and_many(experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs, many_rows: int) -> torch.Tensor:
    """Compute what `fused_experts` does: experts with `many_rows` or more in slices, the others in one fused call.

    `experts` in PACKED_BFLOAT16. `hidden_TH` bfloat16. Returns bfloat16 [T, H].
    """
    many_N = np.bincount(pairs.local_P, minlength=len(experts.ids)) >= many_rows
    if not many_N.any():
        return fused_experts(experts, hidden_TH, pairs)
    out_PH = torch.empty(len(pairs.tokens_P), hidden_TH.shape[1], dtype=torch.bfloat16)
    few_P = np.flatnonzero(~many_N[pairs.local_P])
    if len(few_P):
        few = Pairs(pairs.tokens_P[few_P], pairs.local_P[few_P], pairs.scale_P[few_P])
        out_PH[torch.from_numpy(few_P)] = run_fused(experts, hidden_TH, few)
    for local in np.flatnonzero(many_N).tolist():
        of_expert_P = np.flatnonzero(pairs.local_P == local)
        for at_R in np.split(of_expert_P, range(_CHUNK, len(of_expert_P), _CHUNK)):
            rows = Pairs(pairs.tokens_P[at_R], pairs.local_P[at_R], pairs.scale_P[at_R])
            out_PH[torch.from_numpy(at_R)] = _sliced_expert(experts, local, hidden_TH, rows)
    return sum_by_token(out_PH, pairs, len(hidden_TH))


def _sliced_expert(experts: LayerExperts, local: int, hidden_TH: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """scale x expert(hidden) of each pair, all of them of expert `local`. Returns bfloat16 [R, H]."""
    gate_RI, up_RI = _sliced_product(experts.gate_up[local], hidden_TH, pairs.tokens_P).chunk(2, dim=-1)
    inner_RI = functional.silu(gate_RI).mul_(up_RI).mul_(torch.from_numpy(pairs.scale_P)[:, None])
    out_RH = torch.empty(len(inner_RI), hidden_TH.shape[1], dtype=torch.bfloat16)
    torch.ops._C.weight_packed_linear(out_RH, inner_RI.to(torch.bfloat16), experts.down[local], None, True)
    return out_RH


def _sliced_product(weight: torch.Tensor, hidden_TH: torch.Tensor, tokens_R: np.ndarray) -> torch.Tensor:
    """hidden[tokens] W^T of a packed weight, in one call for all slices of all blocks. Returns float32 [R, 32 B].

    The call wants the operands of matrix n = S b + s at a fixed distance: for slice s, block after block. In rows of S
    slices that lie one behind the other, n slices further is slice s of the row b further down. So block b gets the
    rows from b on, and those behind the last one are the first ones again: each block meets all rows, rotated by b.
    """
    rows, blocks, hidden = len(tokens_R), len(weight) // BLOCK_ROWS, hidden_TH.shape[1]
    slices = slices_of(hidden)
    columns = hidden // slices
    x = hidden_TH.index_select(0, torch.from_numpy(tokens_R[np.arange(rows + blocks) % rows]))
    rotated = x.as_strided((blocks * slices, rows, columns), (columns, hidden, 1))
    parts = torch.empty(blocks * slices, rows, BLOCK_ROWS, dtype=torch.bfloat16)
    torch.ops._C.bmm_cpu(parts, rotated, weight.view(-1, BLOCK_ROWS, columns), True, None)
    sums = parts.view(blocks, slices, rows, BLOCK_ROWS).sum(1, dtype=torch.float32)
    block_B, row_R = np.arange(blocks), np.arange(rows)
    back_RB = block_B * rows + (row_R[:, None] - block_B) % rows
    return sums.view(-1, BLOCK_ROWS).index_select(0, torch.from_numpy(back_RB.ravel())).view(rows, -1)
