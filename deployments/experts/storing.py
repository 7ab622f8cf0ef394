"""Brings rows of an expert into the form that computes: dequantised, quantised or packed, into their place.

Legend: R rows and C columns of a projection, or of a strip of it; I intermediate size.
"""

from __future__ import annotations

import torch

from deployments.experts.forms import Form
from deployments.experts.packing import lift_low_blocks, pack
from deployments.experts.weights import FP8, PACKED, LayerExperts

_INT8_MAX, _LEAST_ABS = 127, 1e-30  # a row of zeros has a scale too

_SIGN_AND_LOW_BITS = ~0x4000  # of a float16 made from a sign-extended E4M3
_NAN_CODE = 0x7F


def store(layer: LayerExperts, local: int, gate_up_2IH: torch.Tensor, down_HI: torch.Tensor) -> None:
    """Put one expert into its place: packed or quantised first, if the layer's form says so. Its dtype is that of
    `weights.DTYPES`.

    FP8's scales are in their place before. It and they may be changed here, as the kernel needs them.
    """
    if layer.form is Form.VECTOR_BFLOAT16:
        for stack, weight in ((layer.gate_up, gate_up_2IH), (layer.down, down_HI)):
            torch.ops._C.prepack_moe_weight(weight[None], stack[local : local + 1], "vec")
        return
    put_rows(layer, local, "gate_up", 0, gate_up_2IH)
    put_rows(layer, local, "down", 0, down_HI)


def put_rows(layer: LayerExperts, local: int, name: str, first: int, rows_RC: torch.Tensor) -> None:
    """Do so with some rows of the stack `name` ("gate_up" or "down"), from row `first` on, in any form but
    VECTOR_BFLOAT16. `first` and R: multiples of 32 where the form is packed, of 128 where it is FP8.
    """
    gate_up = name == "gate_up"
    place_RC = (layer.gate_up if gate_up else layer.down)[local, first : first + len(rows_RC)]
    scales = layer.gate_up_scale if gate_up else layer.down_scale
    if layer.form is Form.PACKED_INT8:
        assert scales is not None
        scale_R = torch.maximum(rows_RC.amax(1), -rows_RC.amin(1)).clamp_(min=_LEAST_ABS).div_(_INT8_MAX)
        scales[local, first : first + len(rows_RC)] = scale_R
        rows_RC = (rows_RC / scale_R[:, None]).round_().to(torch.int8)
    elif layer.form is Form.PACKED_FP8:
        assert scales is not None
        lift_low_blocks(rows_RC, scales[local, first // 128 : (first + len(rows_RC)) // 128], (128, 128))
    if layer.form in PACKED:
        pack(rows_RC, place_RC)
    else:
        place_RC.copy_(rows_RC, non_blocking=True)
        if place_RC.is_cuda:
            torch.cuda.current_stream().synchronize()  # the next rows are read into the same pinned buffer


def scale_place(layer: LayerExperts, local: int, projection: int) -> torch.Tensor | None:
    """Return where the block scales of projection 0 (gate), 1 (up) or 2 (down) belong; None if the form has none."""
    if layer.form not in FP8:
        return None
    assert layer.gate_up_scale is not None
    assert layer.down_scale is not None
    half = len(layer.gate_up_scale[local]) // 2
    up = layer.gate_up_scale[local]
    return (up[:half], up[half:], layer.down_scale[local])[projection]


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
