"""Weights in the layout of vLLM's packed kernel.

The layout is that of `convert_weight_packed`: blocks of 32 output rows; within a block, units of 4 bytes (bfloat16,
int8) or 2 bytes (FP8) of a row are the columns of a transposed matrix. int8 adds one int32 per row after each block:
128 times the row's sum, which the kernel subtracts since it computes with unsigned activations. Transposing with torch
is 4 to 10 times as fast as `convert_weight_packed` on one thread; a test holds the two against each other.

Legend: R output rows (a multiple of 32), C input columns; B matrices of M x N words.
"""

from __future__ import annotations

import torch

BLOCK_ROWS = 32
_STRIP_BYTES = 1 << 19


def pack(weight_RC: torch.Tensor, out: torch.Tensor) -> None:
    """Pack a weight into `out` [R, C], for int8 [R, C + 4], contiguous and of the same dtype: by strips that fit the
    processor's cache, and so do the temporary copies.
    """
    rows = max(1, _STRIP_BYTES // weight_RC[0].nbytes // BLOCK_ROWS) * BLOCK_ROWS
    for strip, place in zip(weight_RC.split(rows), out.split(rows), strict=True):
        _pack_rows(strip, place)


def _pack_rows(weight_RC: torch.Tensor, out: torch.Tensor) -> None:
    blocks = len(weight_RC) // BLOCK_ROWS
    words = _transposed(weight_RC.view(torch.int32).view(blocks, BLOCK_ROWS, -1))
    if weight_RC.dtype is torch.float8_e4m3fn:  # two units in a word; taking the lower half is what a conversion does
        units = out.view(torch.int16).view(blocks, -1, 2, BLOCK_ROWS)
        units[:, :, 0] = words
        units[:, :, 1] = words >> 16
        return
    if weight_RC.dtype is torch.bfloat16:
        out.view(torch.int32).view(words.shape).copy_(words)
        return
    units = out.view(blocks, -1).view(torch.int32).view(blocks, -1, BLOCK_ROWS)  # the last are the sums
    units[:, :-1] = words
    units[:, -1] = weight_RC.sum(1, dtype=torch.int32).view(blocks, BLOCK_ROWS) * 128


def _transposed(words_BMN: torch.Tensor) -> torch.Tensor:
    """Return [B, N, M] of int32; words_BMN is contiguous.

    As a shuffle of channels, which torch does in vector registers: 5 times as fast as its copy of a transposed view. It
    only moves bits.
    """
    count, rows, columns = words_BMN.shape
    channels_last = words_BMN.view(torch.float32).view(1, count, 1, rows * columns).permute(0, 3, 1, 2)
    shuffled = torch.channel_shuffle(channels_last, rows).permute(0, 2, 3, 1)
    return shuffled.reshape(count, columns, rows).view(torch.int32)
