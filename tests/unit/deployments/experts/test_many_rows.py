"""Experts in slices: against float32 and the fused kernel, with experts of few and of many rows in one batch."""

from __future__ import annotations

import pytest
import torch

from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.many_rows import slices_of
from deployments.experts.operators import has_packed_kernel
from deployments.experts.storing import store
from deployments.experts.weights import ExpertWeights, empty_layer
from tests.unit.deployments.experts.layers import spec_of

HIDDEN, INNER, HELD, MANY = 4096, 64, 3, 32
ROWS = 300  # more than are computed at once

needs_packed = pytest.mark.skipif(not has_packed_kernel(), reason="needs AVX-512 with bfloat16")


@pytest.fixture(scope="module")
def weights() -> dict[Form, ExpertWeights]:
    """The same bfloat16 experts 0 to 2 in three forms."""
    layers = {
        form: empty_layer(spec_of(HIDDEN, INNER), tuple(range(HELD)), form)
        for form in (Form.FLOAT32, Form.BFLOAT16, Form.PACKED_BFLOAT16)
    }
    generator = torch.Generator().manual_seed(0)
    for local in range(HELD):
        gate_up = (torch.randn(2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5).bfloat16()
        down = (torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5).bfloat16()
        for layer in layers.values():
            store(layer, local, gate_up.to(layer.down.dtype), down.to(layer.down.dtype))
    return {form: ExpertWeights({3: layer}, HELD, 0) for form, layer in layers.items()}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert 0 gets every row, expert 1 each twentieth, expert 2 none."""
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.full((ROWS, 2), -1, dtype=torch.int16)
    ids_TK[:, 0] = 0
    ids_TK[::20, 1] = 1
    return torch.randn(ROWS, HIDDEN, generator=generator).bfloat16(), ids_TK, torch.rand(ROWS, 2, generator=generator)


@needs_packed
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("many_rows", [1, MANY, ROWS])
def test_no_less_exact_than_a_bfloat16_gemm(
    weights: dict[Form, ExpertWeights], threads: int, many_rows: int
) -> None:
    exact_TH = ExpertCompute(weights[Form.FLOAT32], 1).forward(3, *batch())
    gemm_TH = ExpertCompute(weights[Form.BFLOAT16], 1).forward(3, *batch())
    try:
        out_TH = ExpertCompute(weights[Form.PACKED_BFLOAT16], threads, many_rows=many_rows).forward(3, *batch())
    finally:
        torch.set_num_threads(1)
    error_T = (out_TH - exact_TH).norm(dim=1) / exact_TH.norm(dim=1)
    assert float(error_T.max()) < 0.01
    assert (out_TH - exact_TH).norm() <= (gemm_TH - exact_TH).norm()


@needs_packed
def test_few_rows_are_left_to_the_fused_kernel(weights: dict[Form, ExpertWeights]) -> None:
    hidden_TH, ids_TK, weights_TK = batch()
    fused, mixed = (ExpertCompute(weights[Form.PACKED_BFLOAT16], 1, many_rows=n) for n in (None, MANY))
    few = (hidden_TH, ids_TK[:, 1:], weights_TK[:, 1:])
    assert torch.equal(mixed.forward(3, *few), fused.forward(3, *few))
    many_TH = mixed.forward(3, hidden_TH, ids_TK, weights_TK)
    assert not torch.equal(many_TH, fused.forward(3, hidden_TH, ids_TK, weights_TK))
    assert torch.equal(mixed.forward(3, hidden_TH, ids_TK, weights_TK), many_TH)


@pytest.mark.parametrize(
    ("columns", "slices"), [(256, 1), (2048, 1), (2080, 5), (4096, 2), (6144, 3), (7168, 4), (4100, 1)]
)
def test_slices_are_short_and_even(columns: int, slices: int) -> None:
    assert slices_of(columns) == slices
