"""Brings rows of an expert into the form that computes: quantised or packed, into their place.

Legend: R rows and C columns of a projection, or of a strip of it; I intermediate size.
"""

from __future__ import annotations

import torch

from deployments.experts.forms import Form
from deployments.experts.packing import pack
from deployments.experts.weights import FP8, PACKED, LayerExperts
from deployments.hosting.fp8_blocks import lift_low_blocks

_INT8_MAX, _LEAST_ABS = 127, 1e-30  # a row of zeros has a scale too


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
