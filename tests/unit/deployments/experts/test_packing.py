"""Our packing is vLLM's, bit for bit, and FP8 blocks of any range reach its kernel right."""

from __future__ import annotations

import pytest
import torch

from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.operators import has_packed_kernel
from deployments.experts.packing import pack
from deployments.experts.storing import store
from deployments.experts.weights import ExpertWeights, empty_layer
from deployments.hosting.fp8_blocks import dequantise, lift_low_blocks
from tests.unit.deployments.experts.layers import EXPERTS, HIDDEN, INNER, spec_of

needs_packed = pytest.mark.skipif(not has_packed_kernel(), reason="needs AVX-512 with bfloat16")


@needs_packed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (96, 64), (256, 160), (4096, 7168)])
def test_packs_as_the_library_does(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Any bits, NaN of every kind too: weights are moved, never computed with."""
    generator = torch.Generator().manual_seed(rows)
    bits = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator)
    theirs = torch.ops._C.convert_weight_packed(bits.view(dtype))
    ours = torch.empty_like(theirs)
    pack(bits.view(dtype), ours)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_blocks_of_small_fp8_values_are_lifted_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(200, 300, generator=generator) * 0.01).to(torch.float8_e4m3fn)  # most are subnormal
    weight[:128, 128:256] = 0
    weight[128:, :128] = (torch.randn(72, 128, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator) + 0.5
    before, after = torch.empty(200, 300), torch.empty(200, 300)
    dequantise(weight, scale, (128, 128), before)
    kept = weight[128:, :128].clone()
    lift_low_blocks(weight, scale, (128, 128))
    dequantise(weight, scale, (128, 128), after)
    assert torch.equal(before, after)
    assert torch.equal(weight[128:, :128].view(torch.uint8), kept.view(torch.uint8))
    assert weight[:128, :128].float().abs().max() > 200
    assert scale[0, 1] == 0


@needs_packed
@pytest.mark.parametrize("tokens", [1, 40])
def test_fp8_that_was_never_scaled_is_computed_right(tokens: int) -> None:
    """Scales of 1, half of the values subnormal, and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(2 * INNER, HIDDEN, generator=generator) * 0.02).to(torch.float8_e4m3fn)
    down = (torch.randn(HIDDEN, INNER, generator=generator) * 0.02).to(torch.float8_e4m3fn)
    down[:128] = 0
    exact, fp8 = (empty_layer(spec_of(), (0,), form) for form in (Form.FLOAT32, Form.PACKED_FP8))
    assert fp8.gate_up_scale is not None
    assert fp8.down_scale is not None
    fp8.gate_up_scale.fill_(1)
    fp8.down_scale.fill_(1)
    store(exact, 0, gate_up.float(), down.float())
    store(fp8, 0, gate_up, down)
    batch = torch.randn(tokens, HIDDEN, generator=generator).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int16)
    expected_TH, found_TH = (
        ExpertCompute(ExpertWeights({3: layer}, EXPERTS, 0), 1).forward(3, *batch, torch.ones(tokens, 1))
        for layer in (exact, fp8)
    )
    assert (found_TH - expected_TH).norm() < 0.008 * expected_TH.norm()
    assert not found_TH[:, :128].any()
