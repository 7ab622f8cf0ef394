"""Experts that got many rows, computed on the packed weights in slices of the hidden size.

`fused_experts_cpu` multiplies a tile of rows with a block of weights over the whole hidden size: at 7168 neither fits
the processor's second cache beside the other, and it stays at two thirds of what it does at 2048. A block of 32 rows of
packed weights (packing.py) is contiguous along the hidden size, so a slice of it is a packed block of its own, which
vLLM's `bmm_cpu` multiplies. The partial products are bfloat16 and summed in float32: as exact as a bfloat16 GEMM for
gate and up, a little less than the fused kernel (benchmarks/expert_kernels.py).

Legend: T tokens, P pairs of token and expert, R rows of one expert, H hidden size, I intermediate size; a weight is B
blocks of 32 output rows, each of S slices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from deployments.experts.kernels import Pairs, run_fused, sum_by_token
from deployments.experts.packing import BLOCK_ROWS
from deployments.experts.weights import LayerExperts

_LONGEST = 2048  # columns of a slice: from here on the rate falls (cache of 1 MiB per core)
_LEAST_COLUMNS = 32  # a slice is a multiple of these
# Rows computed at once, and rows that several blocks make a call of when there are threads to wake: with copies of the
# hidden states, which should stay in the third cache.
_CHUNK, _CALL_ROWS = 256, 512


def slices_of(columns: int) -> int:
    """Return into how many slices a weight of so many columns is cut; 1: it is short enough, or cannot be cut."""
    slices = 1
    while columns > slices * _LONGEST or columns % (slices * _LEAST_COLUMNS):
        slices += 1
        if columns < slices * _LEAST_COLUMNS:
            return 1
    return slices


def few_and_many(
    experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs, many_rows: int
) -> torch.Tensor:
    """Compute what `fused_experts` does: experts with `many_rows` or more in slices, the others in one fused call.

    `experts` in PACKED_BFLOAT16. `hidden_TH` bfloat16. Returns bfloat16 [T, H].
    """
    many_N = np.bincount(pairs.local_P, minlength=len(experts.ids)) >= many_rows
    out_PH = torch.empty(len(pairs.tokens_P), hidden_TH.shape[1], dtype=torch.bfloat16)
    few_P = np.flatnonzero(~many_N[pairs.local_P])
    if len(few_P):
        few = Pairs(pairs.tokens_P[few_P], pairs.local_P[few_P], pairs.scale_P[few_P])
        out_PH[torch.from_numpy(few_P)] = run_fused(experts, hidden_TH, few)
    for local in np.flatnonzero(many_N).tolist():
        for at_R in np.split(at_P := np.flatnonzero(pairs.local_P == local), range(_CHUNK, len(at_P), _CHUNK)):
            x_RH = hidden_TH.index_select(0, torch.from_numpy(pairs.tokens_P[at_R]))
            scale_R = torch.from_numpy(pairs.scale_P[at_R])
            out_PH[torch.from_numpy(at_R)] = _expert(experts.gate_up[local], experts.down[local], x_RH, scale_R)
    return sum_by_token(out_PH, pairs, len(hidden_TH))


def _expert(gate_up: torch.Tensor, down: torch.Tensor, x_RH: torch.Tensor, scale_R: torch.Tensor) -> torch.Tensor:
    """scale x expert(x). `gate_up` and `down` packed bfloat16. Returns bfloat16 [R, H]."""
    gate, up = _sliced_product(gate_up, x_RH).chunk(2)
    inner = functional.silu(gate).mul_(up).mul_(scale_R[:, None])  # [I/32, R, 32]
    inner_RI = inner.to(torch.bfloat16).transpose(0, 1).reshape(len(x_RH), -1)
    out_RH = torch.empty_like(x_RH)
    torch.ops._C.weight_packed_linear(out_RH, inner_RI, down, None, True)
    return out_RH


def _sliced_product(weight: torch.Tensor, x_RH: torch.Tensor) -> torch.Tensor:
    """x W^T by blocks of 32 of its columns. Returns float32 [B, R, 32]."""
    blocks, slices, rows = len(weight) // BLOCK_ROWS, slices_of(weight.shape[1]), len(x_RH)
    columns = weight.shape[1] // slices
    x = x_RH.view(rows, slices, columns).transpose(0, 1)
    copies = _blocks_per_call(blocks, rows)
    if copies > 1:
        x = x.repeat(copies, 1, 1)
    parts = torch.empty(blocks, slices, rows, BLOCK_ROWS, dtype=torch.bfloat16)
    calls = (blocks // copies, copies * slices)
    for part, block in zip(parts.view(*calls, rows, BLOCK_ROWS), weight.view(*calls, BLOCK_ROWS, columns), strict=True):
        torch.ops._C.bmm_cpu(part, x, block, True, None)
    return parts.sum(1, dtype=torch.float32)


def _blocks_per_call(blocks: int, rows: int) -> int:
    """One where nobody has to be woken: a call for several blocks needs as many copies of the hidden states."""
    copies = 1
    while torch.get_num_threads() > 1 and blocks % (2 * copies) == 0 and 2 * copies * rows <= _CALL_ROWS:
        copies *= 2
    return copies
