"""A model's sizes and a layer's experts, in any form, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.model.spec import ExpertQuant, ModelSpec
from deployments.experts.forms import Form
from deployments.experts.storing import store
from deployments.experts.weights import ExpertWeights, empty_layer
from tests.checkpoints import quantise_fp8

HIDDEN, INNER, EXPERTS, HELD = 256, 128, 12, 5


def spec_of(hidden: int = HIDDEN, inner: int = INNER, fp8_block: tuple[int, int] | None = None) -> ModelSpec:
    """Sizes of a model of one MoE layer."""
    return ModelSpec(
        path=Path("none"), architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", hidden_size=hidden,
        moe_intermediate_size=inner, num_experts=EXPERTS, top_k=4, num_shared_experts=1, num_hidden_layers=4,
        num_mtp_layers=0, vocab_size=320, max_position_embeddings=512, moe_layers=(3,), dtype="bfloat16",
        expert_quant=None if fp8_block is None else ExpertQuant("fp8", fp8_block), attention_params=0,
        mtp_attention_params=0,
    )  # fmt: skip


def weights_of(form: Form, rounded_to_fp8: bool = False) -> ExpertWeights:
    """The same five experts, 2 to 6, of layer 3 in any form; `rounded_to_fp8`: values that FP8 with blocks can hold."""
    generator = torch.Generator().manual_seed(0)
    layer = empty_layer(spec_of(), tuple(range(2, 2 + HELD)), form)
    for local in range(HELD):
        gate_up = (torch.randn(2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5).bfloat16()
        down = (torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5).bfloat16()
        if form is Form.PACKED_FP8:
            assert layer.gate_up_scale is not None
            assert layer.down_scale is not None
            gate_up, layer.gate_up_scale[local] = quantise_fp8(gate_up)
            down, layer.down_scale[local] = quantise_fp8(down)
        elif rounded_to_fp8:
            gate_up, down = _rounded(gate_up), _rounded(down)
        elif form is Form.PACKED_INT8:
            gate_up, down = gate_up.float(), down.float()
        store(layer, local, gate_up, down)
    return ExpertWeights({3: layer}, EXPERTS, 0)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    fp8, scale = quantise_fp8(weight)
    return fp8.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
