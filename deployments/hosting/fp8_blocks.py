"""FP8 weights with a scale per block (E4M3, `weight_scale_inv`), as DeepSeek-V3 is released: both halves of the model.

Legend: R rows, C columns of a weight.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_SIGN_AND_LOW_BITS = ~0x4000  # of a float16 made from a sign-extended E4M3
_NAN_CODE = 0x7F
_LOW = 0x58  # FP8 code of 16
_LARGEST = 448.0


def dequantise(weight_RC: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int], out_RC: torch.Tensor) -> None:
    """Compute weight x its block's scale in float32 and write it to `out_RC`, rounded to its dtype.

    weight_RC: float8_e4m3fn [R, C]. scale_inv: float32 [ceil(R/rows), ceil(C/columns)]; the last blocks may be ragged.

    torch's own conversion from float8 is 7x slower than moving bits: the seven lower bits of E4M3, shifted into place,
    are a float16 (bias 15 for 7, subnormals too) that is 2**8 times too small. Only NaN comes out finite.
    """
    rows, columns = block
    codes = weight_RC.view(torch.int8)
    half = torch.empty(rows, codes.shape[1], dtype=torch.int16)
    full = torch.empty(rows, codes.shape[1], dtype=torch.float32)
    for at, scales in enumerate(scale_inv):
        strip = codes[at * rows : (at + 1) * rows]
        bits, values = half[: len(strip)], full[: len(strip)]
        bits.copy_(strip)  # extends the sign
        bits.bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_LOW_BITS)
        values.copy_(bits.view(torch.float16))
        values *= (scales * 256).repeat_interleave(columns)[: strip.shape[1]]
        if int(strip.bitwise_and(127).max()) == _NAN_CODE:
            values[strip.bitwise_and(127) == _NAN_CODE] = torch.nan
        out_RC[at * rows : (at + 1) * rows] = values


def lift_low_blocks(weight_RC: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> None:
    """Multiply blocks of small values by a power of two and divide their scales by it, in place and exactly.

    vLLM's packed kernel takes the code of a subnormal m x 2**-9 for (1 + m/8) x 2**-7, and that of 0 too. In a block
    that is scaled to FP8's range, as DeepSeek-V3's are, that is a hundredth of bfloat16's rounding of the largest one;
    in one that is not, it would be wrong. Blocks of zeros get scale 0. The last blocks may be ragged.
    """
    rows, columns = block
    for at, scales in enumerate(scale_inv):
        strip = weight_RC[at * rows : (at + 1) * rows]
        codes = strip.view(torch.int8).bitwise_and(127)
        peaks = functional.pad(codes.amax(0), (0, -codes.shape[1] % columns)).view(-1, columns).amax(1)
        if int(peaks.min()) >= _LOW:
            continue
        for number in (peaks < _LOW).nonzero().flatten().tolist():
            part = strip[:, number * columns : (number + 1) * columns]
            largest = part.float().abs().max()
            if largest == 0:
                scales[number] = 0
                continue
            power = float(2 ** torch.floor(torch.log2(_LARGEST / largest)))
            part.copy_(part.float() * power)
            scales[number] /= power
