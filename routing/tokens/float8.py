"""Hidden states as FP8 with one scale per 128 values: half the bytes of bfloat16 on their way to the experts.

DeepSeek-V3 quantises what it dispatches in the same way (E4M3, tiles of 1 x 128; DeepSeek-V3 Technical Report, 3.3.2).

Legend: T rows (tokens), H hidden size, B blocks of a row: ceil(H / 128), of which the last may be shorter.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK = 128
_MAX = 448.0  # the largest finite E4M3 value
_LEAST_EXPONENT = -126  # of float32 without subnormal numbers
# By byte, its value: torch's own conversion takes 6 ns per value on CPU, a look-up 1 ns.
_VALUES = np.arange(256, dtype=np.uint8)
_FLOAT32_OF_BYTE = torch.from_numpy(_VALUES).view(torch.float8_e4m3fn).to(torch.float32).numpy()


def blocks(hidden: int) -> int:
    """Number of scales of a row."""
    return -(-hidden // BLOCK)


def quantise(hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values float8_e4m3fn [T, H] and scales float32 [T, B]; hidden is about value * scale of its block.

    Scales are powers of two, so that bfloat16 holds every product exactly. With m the largest |x| of x's block, the
    error is at most max(|x| / 16, m / 2**17). A block with an infinity or a not-a-number has scale 1; both arrive as
    not-a-numbers.
    """
    rows, hidden = hidden_TH.shape
    blocks_B = blocks(hidden)
    whole_TH = hidden_TH
    if hidden % BLOCK:
        whole_TH = torch.nn.functional.pad(hidden_TH, (0, blocks_B * BLOCK - hidden))
    blocks_TB128 = whole_TH.view(rows, blocks_B, BLOCK)
    most_TB = blocks_TB128.abs().amax(dim=-1).to(torch.float32)
    # The least power of two with most / scale <= 448: frexp gives most / 448 = m * 2**e with 0.5 <= m < 1.
    mantissa_TB, exponent_TB = torch.frexp(most_TB / _MAX)
    exponent_TB = (exponent_TB - (mantissa_TB == 0.5).to(torch.int32)).clamp_(min=_LEAST_EXPONENT)
    scales_TB = torch.ldexp(torch.ones_like(most_TB), exponent_TB)
    finite_TB = torch.isfinite(most_TB)
    scales_TB = torch.where(finite_TB & (most_TB > 0), scales_TB, 1.0)
    if not finite_TB.all():
        blocks_TB128 = blocks_TB128 + 0 * blocks_TB128  # FP8 has no infinity, and converting takes 448 for it
    # In one dtype and in place, where torch is fastest. 1 / scale is exact.
    scaled_TB128 = blocks_TB128.to(torch.float32, copy=True).mul_(scales_TB.reciprocal().unsqueeze(-1))
    values_TH = scaled_TB128.view(rows, blocks_B * BLOCK)[:, :hidden]
    return values_TH.to(torch.float8_e4m3fn).contiguous(), scales_TB


def dequantise(values_TH: np.ndarray, scales_TB: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return value * scale in `dtype` [T, H], computed in float32. `values_TH`: E4M3 bytes, uint8."""
    rows, hidden = values_TH.shape
    wide_TH = torch.from_numpy(_FLOAT32_OF_BYTE.take(values_TH))
    scales = torch.from_numpy(scales_TB)
    whole = hidden // BLOCK
    if whole:
        wide_TH[:, : whole * BLOCK].view(rows, whole, BLOCK).mul_(scales[:, :whole].unsqueeze(-1))
    if hidden % BLOCK:
        wide_TH[:, whole * BLOCK :].mul_(scales[:, whole:])
    return wide_TH.to(dtype)
