"""The Triton kernels of `deployments.experts.grouped_gemm`.

Where a tile has few rows, the weight is the left operand and they are the right one (ROWS_LEFT false): the tensor
cores' instructions take 64 rows of the left one, and from 8 of the right one. So decode wastes nothing, and reads each
weight once. Where it has many, they are the left one: their scales then take few registers.

Legend: HIDDEN, INNER hidden and intermediate size; M rows of a tile, N rows of a weight's tile, K columns that are
summed over, G groups of 128 columns, P pairs of token and expert, C columns of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantise(x_ptr, out_ptr, scale_ptr, HIDDEN: tl.constexpr, GROUPS: tl.constexpr, LARGEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group_G = tl.program_id(1) * 8 + tl.arange(0, 8)
    inside_G1 = (group_G < GROUPS)[:, None]
    at_GK = row * HIDDEN + group_G[:, None] * 128 + tl.arange(0, 128)[None, :]
    x_GK = tl.load(x_ptr + at_GK, mask=inside_G1, other=0.0).to(tl.float32)
    scale_G = tl.maximum(tl.max(tl.abs(x_GK), axis=1), 1e-10) / LARGEST
    tl.store(out_ptr + at_GK, (x_GK / scale_G[:, None]).to(tl.float8e4nv), mask=inside_G1)
    tl.store(scale_ptr + row * GROUPS + group_G, scale_G, mask=group_G < GROUPS)


@triton.jit
def _zeros(ROWS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.zeros((BLOCK_M, BLOCK_N) if ROWS_LEFT else (BLOCK_N, BLOCK_M), tl.float32)


@triton.jit
def _add_product(sums, x_MK, w_NK, ROWS_LEFT: tl.constexpr):
    return tl.dot(x_MK, tl.trans(w_NK), sums) if ROWS_LEFT else tl.dot(w_NK, tl.trans(x_MK), sums)


@triton.jit
def _add_scaled_product(sums, x_MK, w_NK, scale_M, ROWS_LEFT: tl.constexpr):
    if ROWS_LEFT:
        sums += tl.dot(x_MK, tl.trans(w_NK)) * scale_M[:, None]
    else:
        sums += tl.dot(w_NK, tl.trans(x_MK)) * scale_M[None, :]
    return sums


@triton.jit
def gate_up(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, out_scale_ptr, rows_ptr, tiles_ptr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, SCALED: tl.constexpr, LARGEST: tl.constexpr,
    ROWS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // (INNER // BLOCK_N), tl.program_id(0) % (INNER // BLOCK_N)
    expert = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first, end = tl.load(tiles_ptr + 4 * tile + 1), tl.load(tiles_ptr + 4 * tile + 2)
    pair_M = first + tl.arange(0, BLOCK_M)
    row_M = tl.load(rows_ptr + tl.minimum(pair_M, end - 1))
    k, n = tl.arange(0, BLOCK_K), block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + row_M[:, None] * HIDDEN + k[None, :]
    gate_ptrs = w_ptr + expert * (2 * INNER * HIDDEN) + n[:, None] * HIDDEN + k[None, :]
    up_ptrs = gate_ptrs + INNER * HIDDEN
    gate = _zeros(ROWS_LEFT, BLOCK_M, BLOCK_N)
    up = _zeros(ROWS_LEFT, BLOCK_M, BLOCK_N)
    if SCALED:
        GROUPS: tl.constexpr = HIDDEN // 128
        x_scale_ptrs = x_scale_ptr + row_M * GROUPS
        gate_scale_ptr = w_scale_ptr + (expert * (2 * INNER // 128) + block) * GROUPS
        up_scale_ptr = gate_scale_ptr + (INNER // 128) * GROUPS
        # Scales are read one group ahead: a load at its use would hold up the tensor cores.
        x_scale_M, gate_scale, up_scale = tl.load(x_scale_ptrs), tl.load(gate_scale_ptr), tl.load(up_scale_ptr)
        for group in range(GROUPS):
            x_MK = tl.load(x_ptrs)
            gate = _add_scaled_product(gate, x_MK, tl.load(gate_ptrs), x_scale_M * gate_scale, ROWS_LEFT)
            up = _add_scaled_product(up, x_MK, tl.load(up_ptrs), x_scale_M * up_scale, ROWS_LEFT)
            following = tl.minimum(group + 1, GROUPS - 1)
            x_scale_M = tl.load(x_scale_ptrs + following)
            gate_scale, up_scale = tl.load(gate_scale_ptr + following), tl.load(up_scale_ptr + following)
            x_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
    else:
        for _ in range(HIDDEN // BLOCK_K):
            x_MK = tl.load(x_ptrs)
            gate = _add_product(gate, x_MK, tl.load(gate_ptrs), ROWS_LEFT)
            up = _add_product(up, x_MK, tl.load(up_ptrs), ROWS_LEFT)
            x_ptrs += BLOCK_K
            gate_ptrs += BLOCK_K
            up_ptrs += BLOCK_K
    inner_MN = gate * tl.sigmoid(gate) * up
    if not ROWS_LEFT:
        inner_MN = tl.trans(inner_MN)
    valid_M = pair_M < end
    if SCALED:
        scale_M = tl.maximum(tl.max(tl.abs(inner_MN), axis=1), 1e-10) / LARGEST
        tl.store(out_scale_ptr + pair_M * (INNER // 128) + block, scale_M, mask=valid_M)
        inner_MN = inner_MN / scale_M[:, None]
    out_ptrs = out_ptr + pair_M[:, None] * INNER + n[None, :]
    tl.store(out_ptrs, inner_MN.to(out_ptr.dtype.element_ty), mask=valid_M[:, None])


@triton.jit
def down(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, tiles_ptr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, SCALED: tl.constexpr,
    ROWS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0) // (HIDDEN // BLOCK_N), tl.program_id(0) % (HIDDEN // BLOCK_N)
    expert = tl.load(tiles_ptr + 4 * tile).to(tl.int64)
    first, end = tl.load(tiles_ptr + 4 * tile + 1), tl.load(tiles_ptr + 4 * tile + 2)
    pair_M = first + tl.arange(0, BLOCK_M)
    row_M = tl.minimum(pair_M, end - 1)
    k, n = tl.arange(0, BLOCK_K), block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + row_M[:, None] * INNER + k[None, :]
    w_ptrs = w_ptr + expert * (HIDDEN * INNER) + n[:, None] * INNER + k[None, :]
    out = _zeros(ROWS_LEFT, BLOCK_M, BLOCK_N)
    if SCALED:
        GROUPS: tl.constexpr = INNER // 128
        x_scale_ptrs = x_scale_ptr + row_M * GROUPS
        scale_ptr = w_scale_ptr + (expert * (HIDDEN // 128) + block) * GROUPS
        x_scale_M, scale = tl.load(x_scale_ptrs), tl.load(scale_ptr)
        for group in range(GROUPS):
            out = _add_scaled_product(out, tl.load(x_ptrs), tl.load(w_ptrs), x_scale_M * scale, ROWS_LEFT)
            following = tl.minimum(group + 1, GROUPS - 1)
            x_scale_M, scale = tl.load(x_scale_ptrs + following), tl.load(scale_ptr + following)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    else:
        for _ in range(INNER // BLOCK_K):
            out = _add_product(out, tl.load(x_ptrs), tl.load(w_ptrs), ROWS_LEFT)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
    if not ROWS_LEFT:
        out = tl.trans(out)
    tl.store(out_ptr + pair_M[:, None].to(tl.int64) * HIDDEN + n[None, :], out, mask=(pair_M < end)[:, None])


@triton.jit
def sum_pairs(out_ptr, place_ptr, weight_ptr, first_ptr, sum_ptr, HIDDEN: tl.constexpr, PAIRS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    first, end = tl.load(first_ptr + token), tl.load(first_ptr + token + 1)
    sum_C = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, end, PAIRS):
        pair_P = start + tl.arange(0, PAIRS)
        there_P = pair_P < end
        place_P = tl.load(place_ptr + pair_P, mask=there_P, other=0).to(tl.int64)
        weight_P = tl.load(weight_ptr + pair_P, mask=there_P, other=0.0)
        out_PC = tl.load(
            out_ptr + place_P[:, None] * HIDDEN + column[None, :], mask=there_P[:, None] & inside[None, :], other=0.0
        )
        sum_C += tl.sum(out_PC * weight_P[:, None], axis=0)
    tl.store(sum_ptr + token.to(tl.int64) * HIDDEN + column, sum_C.to(sum_ptr.dtype.element_ty), mask=inside)
