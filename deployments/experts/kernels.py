"""The kernels of an expert worker but for GPUs' grouped ones: GEMMs per expert, and on CPU vLLM's fused experts.

Legend: T tokens, P pairs of token and expert, N held experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from deployments.experts.forms import Form
from deployments.experts.weights import LayerExperts

# Row counts from which MKL's float32 GEMM gives a row the same bits whatever the rows beside it (one thread).
_STABLE_ROWS = 16
_METHOD = {Form.PACKED_BFLOAT16: 0, Form.PACKED_INT8: 1, Form.PACKED_FP8: 2}  # of `fused_experts_cpu`
_BLOCK = [128, 128]


@dataclass(frozen=True)
class Pairs:
    """Which token meets which held expert, in order of token."""

    tokens_P: np.ndarray  # int64: row of hidden_TH, ascending
    local_P: np.ndarray  # integer: index of the expert among the held ones
    scale_P: np.ndarray  # float32


def fused_experts(experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """sum over pairs of scale x expert(hidden), in one call of vLLM's kernel. Returns bfloat16 [T, H].

    `hidden_TH` bfloat16. The kernel sees each pair as a token with one expert, so that nothing is computed for experts
    of other workers; with one token it sums by itself.
    """
    if len(hidden_TH) == 1:
        out_1H = torch.empty_like(hidden_TH)
        _run(experts, out_1H, hidden_TH, pairs.scale_P[None], pairs.local_P[None])
        return out_1H
    return sum_by_token(run_fused(experts, hidden_TH, pairs), pairs, len(hidden_TH))


def run_fused(experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """scale x expert(hidden) of each pair, in one call of vLLM's kernel. Returns bfloat16 [P, H]."""
    hidden_PH = hidden_TH.index_select(0, torch.from_numpy(pairs.tokens_P))
    out_PH = torch.empty_like(hidden_PH)
    _run(experts, out_PH, hidden_PH, pairs.scale_P[:, None], pairs.local_P[:, None])
    return out_PH


def sum_by_token(out_PH: torch.Tensor, pairs: Pairs, tokens: int) -> torch.Tensor:
    """Sum each token's pairs, in float32 and rounded once. Returns the dtype of out_PH, [T, H]."""
    # A bag of pairs per token: 3 to 20 times as fast as index_add on float32.
    starts_T = torch.from_numpy(np.searchsorted(pairs.tokens_P, np.arange(tokens)))
    return torch.embedding_bag(out_PH, torch.arange(len(out_PH)), starts_T, False, 0)[0]


def _run(experts: LayerExperts, out: torch.Tensor, hidden: torch.Tensor, scale: np.ndarray, local: np.ndarray) -> None:
    weights, ids = torch.from_numpy(scale), torch.from_numpy(local.astype(np.int32))
    if experts.form is Form.VECTOR_BFLOAT16:
        torch.ops._C.cpu_fused_moe(
            out, hidden, experts.gate_up, experts.down, None, None, weights, ids, False, "silu", "vec"
        )
        return
    block = _BLOCK if experts.form is Form.PACKED_FP8 else None
    torch.ops._C.fused_experts_cpu(
        out, hidden, experts.gate_up, experts.down, weights, ids, _METHOD[experts.form], experts.gate_up_scale,
        experts.down_scale, None, None, None, block, None, None, None, None, True,
    )  # fmt: skip


def gemm_per_expert(experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Do the same with two GEMMs for each expert that has pairs. Returns float32 [T, H].

    On one CPU thread a token's float32 result does not depend on its batch: small groups are padded to _STABLE_ROWS.
    """
    device, output_TH = hidden_TH.device, torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    order = np.argsort(pairs.local_P, kind="stable")
    local_P, starts = np.unique(pairs.local_P[order], return_index=True)
    tokens_P, scale_P = (torch.from_numpy(x[order]).to(device) for x in (pairs.tokens_P, pairs.scale_P))
    for local, start, end in zip(local_P.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        tokens, count = tokens_P[start:end], end - start
        x_PH = hidden_TH[tokens]
        if count < _STABLE_ROWS and x_PH.dtype is torch.float32 and device.type == "cpu":
            x_PH = functional.pad(x_PH, (0, 0, 0, _STABLE_ROWS - count))
        gate_PI, up_PI = functional.linear(x_PH, experts.gate_up[local]).chunk(2, dim=-1)
        out_PH = functional.linear(functional.silu(gate_PI) * up_PI, experts.down[local])[:count]
        output_TH.index_add_(0, tokens, out_PH.float() * scale_P[start:end, None])
    return output_TH
