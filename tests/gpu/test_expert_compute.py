"""Experts on a GPU give what they give on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.model.spec import load_checkpoint_index, load_model_spec
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import choose_form
from deployments.experts.weights import load_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_same_as_on_the_cpu(random_checkpoint: Callable[..., Path], dtype: str, tokens: int) -> None:
    path = random_checkpoint("q_lora_groups")
    spec, index = load_model_spec(path), load_checkpoint_index(path)
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, spec.hidden_size, generator=generator)
    ids_TK = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(tokens)]).to(torch.int32)
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.3] = -1
    weights_TK = torch.rand(ids_TK.shape, generator=generator)
    outputs = []
    for device in ("cpu", "cuda"):
        form = choose_form(dtype, "auto", spec, device)
        weights = load_experts(index, spec, {1: range(16)}, form, device)
        outputs.append(ExpertCompute(weights, 1).forward(1, hidden_TH, ids_TK, weights_TK))
    bound = 1e-4 if dtype == "float32" else 0.03
    assert outputs[1].device.type == "cpu"
    assert (outputs[0] - outputs[1]).abs().max() <= bound * outputs[0].abs().max()
    assert torch.equal(outputs[1], ExpertCompute(weights, 1).forward(1, hidden_TH, ids_TK, weights_TK))
