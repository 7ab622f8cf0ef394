"""The CPU top-k ops against the definition, row by row."""

from __future__ import annotations

import pytest
import torch

from deployments.attention.cpu.router_ops import _softmax, _TopK


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_top_k_by_definition(renormalize: bool, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gating = torch.randn(5, 12, generator=generator).to(torch.bfloat16)
    bias = torch.randn(12, generator=generator) if with_bias else None
    weights, ids = torch.empty(5, 4), torch.empty(5, 4, dtype=torch.int32)
    _TopK(_softmax)(weights, ids, torch.empty(5, 4, dtype=torch.int32), gating, renormalize, bias, None)
    for row in range(5):
        scores = torch.softmax(gating[row].float(), 0)
        order = sorted(range(12), key=lambda e: -(scores[e] + (0 if bias is None else bias[e])))[:4]
        assert ids[row].tolist() == order
        expected = scores[order] / (scores[order].sum() if renormalize else 1)
        torch.testing.assert_close(weights[row], expected)
