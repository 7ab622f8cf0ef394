"""Experts on a GPU give what float64 gives, each form within its own rounding, whatever the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.model.spec import load_checkpoint_index, load_model_spec
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form, choose_form
from deployments.experts.loading import load_experts
from tests.gpu.layers import BOUNDS, LAYER, batch, gpu_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")

GROUPED = [Form.GROUPED_BFLOAT16, Form.GROUPED_FP8]


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 64, 130, 600, 1024, 2500])  # 2500: three chunks
@pytest.mark.parametrize("form", BOUNDS)
def test_parity(form: Form, rows: int) -> None:
    experts, turn = gpu_experts(form), batch(rows)
    compute = ExpertCompute(experts.weights, 1)
    out_TH, exact_TH = compute.forward(LAYER, *turn).double(), experts.exact(*turn)
    assert exact_TH.norm() > 0.1
    assert (out_TH - exact_TH).norm() < BOUNDS[form] * exact_TH.norm()
    assert not out_TH[(turn[1] < 0).all(1)].any()


@pytest.mark.parametrize("form", GROUPED)
@pytest.mark.parametrize("rows", [1, 40, 1024])
def test_parity_at_the_sizes_of_deepseek_v3(form: Form, rows: int) -> None:
    experts, turn = gpu_experts(form, 7168, 2048, held=8), batch(rows, 7168, 8, held=8, elsewhere=0.2)
    out_TH, exact_TH = ExpertCompute(experts.weights, 1).forward(LAYER, *turn), experts.exact(*turn)
    assert out_TH.dtype is torch.bfloat16
    assert (out_TH.double() - exact_TH).norm() < BOUNDS[form] * exact_TH.norm()


@pytest.mark.parametrize("form", GROUPED)
@pytest.mark.parametrize("rows", [5, 900, 3000])
def test_a_repeat_gives_the_same_bits_at_the_same_address(form: Form, rows: int) -> None:
    compute, turn = ExpertCompute(gpu_experts(form).weights, 1), batch(rows)
    compute.forward(LAYER, *batch(3000))  # the host's output grows to the longest turn
    first_TH = compute.forward(LAYER, *turn)
    kept_TH, address = first_TH.clone(), first_TH.data_ptr()
    assert first_TH.is_pinned()
    for other in (1, 77, 2000):
        compute.forward(LAYER, *batch(other))
        again_TH = compute.forward(LAYER, *turn)
        assert torch.equal(again_TH, kept_TH)
        assert again_TH.data_ptr() == address


def test_the_gpus_memory_does_not_grow_with_turns() -> None:
    compute = ExpertCompute(gpu_experts(Form.GROUPED_FP8).weights, 1)
    compute.forward(LAYER, *batch(8))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for rows in (3000, 1, 1024):
        compute.forward(LAYER, *batch(rows))
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("form", GROUPED)
def test_one_expert_gets_every_row(form: Form) -> None:
    experts, (hidden_TH, ids_TK, weights_TK) = gpu_experts(form), batch(1024)
    ids_TK[:] = -1
    ids_TK[:, 2] = 4
    out_TH = ExpertCompute(experts.weights, 1).forward(LAYER, hidden_TH, ids_TK, weights_TK).double()
    exact_TH = experts.exact(hidden_TH, ids_TK, weights_TK)
    assert (out_TH - exact_TH).norm() < BOUNDS[form] * exact_TH.norm()


@pytest.mark.parametrize("form", GROUPED)
def test_rows_of_other_workers_alone(form: Form) -> None:
    compute, (hidden_TH, ids_TK, weights_TK) = ExpertCompute(gpu_experts(form).weights, 1), batch(2048)
    ids_TK[:] = -1
    assert not compute.forward(LAYER, hidden_TH, ids_TK, weights_TK).any()
    ids_TK[5] = torch.tensor([2, 3, 4, 5])  # the second chunk has none
    out_TH = compute.forward(LAYER, hidden_TH, ids_TK, weights_TK)
    assert out_TH[5].any()
    assert not out_TH[:5].any()
    assert not out_TH[6:].any()
    assert compute.forward(LAYER, hidden_TH[:0], ids_TK[:0], weights_TK[:0]).shape == (0, 256)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        ("q_lora_groups", "float32", Form.FLOAT32),
        ("q_lora_groups", "bfloat16", Form.GROUPED_BFLOAT16),
        ("fp8", "auto", Form.GROUPED_FP8),
        ("fp8", "bfloat16", Form.GROUPED_BFLOAT16),
    ],
)
def test_a_checkpoint_gives_what_it_gives_on_the_cpu(
    random_checkpoint: Callable[..., Path], shape: str, dtype: str, form: Form, rows: int
) -> None:
    path = random_checkpoint(shape)
    spec, index = load_model_spec(path), load_checkpoint_index(path)
    turn = batch(rows, spec.hidden_size, held=16, first=0)
    on_cpu = load_experts(index, spec, {1: range(16)}, Form.FLOAT32, "cpu")
    assert choose_form(dtype, "auto", spec, "cuda") is form
    on_gpu = load_experts(index, spec, {1: range(16)}, form, "cuda")
    exact_TH = ExpertCompute(on_cpu, 1).forward(1, *turn)
    out_TH = ExpertCompute(on_gpu, 1).forward(1, *turn)
    assert (out_TH - exact_TH).norm() < max(BOUNDS[form], 1e-4) * exact_TH.norm()
