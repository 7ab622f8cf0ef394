"""FP8 linear layers on CPU against their weights dequantised in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from deployments.attention.cpu.block_fp8 import BlockFp8Linear
from deployments.attention.vllm_internals import current_platform
from tests.checkpoints import quantise_fp8

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="on CPU hosts only")


def layer_of(weight_RC: torch.Tensor, dtype: torch.dtype) -> tuple[SimpleNamespace, torch.Tensor]:
    """A layer as vLLM has loaded it, ready to compute, and its true weight."""
    fp8_RC, scale = quantise_fp8(weight_RC)
    full = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(fp8_RC), : fp8_RC.shape[1]]
    true_RC = fp8_RC.double() * full
    layer = SimpleNamespace(
        weight=Parameter(fp8_RC, requires_grad=False), weight_scale_inv=Parameter(scale, requires_grad=False),
        orig_dtype=dtype,
    )  # fmt: skip
    layer.register_parameter = lambda name, value: setattr(layer, name, value)
    return layer, true_RC


@pytest.mark.parametrize(("rows", "columns", "packed"), [
    (256, 256, True), (2112, 512, True),  # 2112: q_a and kv_a of DeepSeek-V3, whose last block is half one
    (576, 384, True), (72, 256, False), (256, 200, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_those_of_the_dequantised_weight(
    rows: int, columns: int, packed: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    weight_RC = torch.randn(rows, columns, generator=generator) / columns**0.5
    weight_RC[:128, :128] *= 1e-3  # one small block
    layer, true_RC = layer_of(weight_RC, dtype)
    method = BlockFp8Linear([128, 128])
    method.process_weights_after_loading(layer)
    has_operator = hasattr(torch.ops._C, "fp8_scaled_mm_cpu")
    assert layer.packed is (packed and has_operator and dtype == torch.bfloat16)
    assert layer.weight.dtype == (torch.float8_e4m3fn if layer.packed else dtype)
    for shape in ((1, columns), (7, columns), (2, 3, columns)):
        x = torch.randn(shape, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(torch.float32 if layer.packed else dtype)
        for added in (None, bias):
            got = method.apply(layer, x, added)
            true = x.double() @ true_RC.T + (0 if added is None else added.double())
            assert got.dtype == dtype
            assert got.shape == true.shape
            assert (got - true).norm() / true.norm() < (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_small_values_are_what_they_are_in_a_product_with_the_identity() -> None:
    """By which vLLM takes MLA's kv_b_proj apart. The operator reads 0 as 2**-7 before its scale, of at most 448."""
    weight_RC = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    fp8_RC = (weight_RC * 2**-6).to(torch.float8_e4m3fn)  # subnormals, where a scale does not fill the range
    layer, _ = layer_of(weight_RC, torch.bfloat16)
    layer.weight.data, layer.weight_scale_inv.data = fp8_RC.clone(), torch.ones(2, 1)
    method = BlockFp8Linear([128, 128])
    method.process_weights_after_loading(layer)
    got_CR = method.apply(layer, torch.eye(128, dtype=torch.bfloat16))
    assert (got_CR.T.float() - fp8_RC.float()).abs().max() <= 2**-7 / 224 * fp8_RC.float().abs().max()
