"""Random experts on a GPU, and what they must give: computed in float64 from the same weights.

Legend: T tokens, K experts per token, N held experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from deployments.experts.forms import Form
from deployments.experts.weights import ExpertWeights, LayerExperts
from tests.checkpoints import quantise_fp8

# Relative error (norm) of each form against float64 on the same weights: of rounding rows, and sums, to its dtype.
BOUNDS = {Form.GROUPED_FP8: 0.06, Form.GROUPED_BFLOAT16: 0.006, Form.FLOAT32: 1e-5, Form.BFLOAT16: 0.006}
LAYER = 3


@dataclass(frozen=True)
class GpuExperts:
    """One layer whose held experts are `first` and up, and its weights as their form has rounded them."""

    layer: LayerExperts
    num_experts: int
    gate_up_N2IH: torch.Tensor  # float32
    down_NHI: torch.Tensor  # float32

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights({LAYER: self.layer}, self.num_experts, 0)

    def exact(self, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sums, float64 [T, H] on the CPU."""
        x_TH, out_TH = hidden_TH.bfloat16().cuda().double(), torch.zeros(hidden_TH.shape, dtype=torch.float64).cuda()
        for local, expert in enumerate(self.layer.ids):
            weight_T = (weights_TK * (ids_TK == expert)).sum(1).cuda().double()
            gate_TI, up_TI = (x_TH @ self.gate_up_N2IH[local].double().T).chunk(2, dim=1)
            out_TH += weight_T[:, None] * ((functional.silu(gate_TI) * up_TI) @ self.down_NHI[local].double().T)
        return out_TH.cpu()


def gpu_experts(form: Form, hidden: int = 256, inner: int = 128, held: int = 5, first: int = 2) -> GpuExperts:
    """Return experts `first` to `first + held - 1` of `held + 7`."""
    generator = torch.Generator("cuda").manual_seed(0)
    gate_up = [_random(2 * inner, hidden, generator) for _ in range(held)]
    down = [_random(hidden, inner, generator) for _ in range(held)]
    ids, scales = tuple(range(first, first + held)), None
    if form is Form.GROUPED_FP8:
        scaled_up, scaled_down = [quantise_fp8(w) for w in gate_up], [quantise_fp8(w) for w in down]
        scales = [torch.stack([scale for _, scale in scaled]) for scaled in (scaled_up, scaled_down)]
        stacks = [torch.stack([weight for weight, _ in scaled]) for scaled in (scaled_up, scaled_down)]
        exact = [torch.stack([_dequantised(*one) for one in scaled]) for scaled in (scaled_up, scaled_down)]
    else:
        dtype = torch.float32 if form is Form.FLOAT32 else torch.bfloat16
        stacks = [torch.stack(weights).to(dtype) for weights in (gate_up, down)]
        exact = [stack.float() for stack in stacks]
    layer = LayerExperts(ids, form, hidden, *stacks, *(scales or ()))
    return GpuExperts(layer, held + 7, *exact)


def batch(
    rows: int, hidden: int = 256, experts_per_row: int = 4, held: int = 5, first: int = 2, elsewhere: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random rows, ids and weights; a share of `elsewhere` of the ids are -1."""
    generator = torch.Generator().manual_seed(rows)
    ids_TK = torch.rand(rows, held, generator=generator).argsort(1)[:, :experts_per_row].to(torch.int16) + first
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < elsewhere] = -1
    hidden_TH = torch.randn(rows, hidden, generator=generator).bfloat16()
    return hidden_TH, ids_TK, torch.rand(ids_TK.shape, generator=generator)


def _random(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator, device="cuda") / columns**0.5


def _dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
