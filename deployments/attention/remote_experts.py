"""The class that vLLM builds in place of its own routed experts; it has them computed by expert workers.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import StartupError
from deployments.attention import dispatch_ops  # noqa: F401  # defines the operators
from deployments.attention.settings import current_settings
from deployments.attention.vllm_internals import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    MoEActivation,
    QuantizationConfig,
    RoutedExperts,
    SharedExperts,
    SharedExpertsOrder,
    extract_layer_index,
)


class RemoteRoutedExperts(RoutedExperts):
    """vLLM's container of routed experts, without the experts: `forward` sends rows to the expert workers.

    Every MoE model of vLLM builds its routed experts through this class, MTP layers included (their index is
    `num_hidden_layers` and up, as in DeepSeek's checkpoints).
    """

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        if current_settings() is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self._refuse_unsupported(moe_config)
        self.layer_index = extract_layer_index(prefix)
        return RemoteExpertsMethod(moe_config)

    def _refuse_unsupported(self, moe_config: FusedMoEConfig) -> None:
        parallel = moe_config.moe_parallel_config
        problems = {
            f"activation {self.activation.value}; expert workers compute SwiGLU (silu)": (
                self.activation is not MoEActivation.SILU or self.swiglu_limit is not None
            ),
            "router weights applied to the experts' input": self.apply_router_weight_on_input,
            "biases in the experts": moe_config.has_bias,
            "data parallelism; use attention.replicas": parallel.dp_size > 1,
            "enable_expert_parallel; experts are remote already": parallel.use_ep,
        }
        found = [problem for problem, present in problems.items() if present]
        if found:
            raise StartupError(f"{self.layer_name} cannot be split: {'; '.join(found)}")


class RemoteExpertsMethod(FusedMoEMethodBase):
    """How `RemoteRoutedExperts` computes: dispatch, the shared expert meanwhile, combine. Holds no weights."""

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """Return True: `apply` itself runs the shared expert, while the rows are away."""
        return True

    @property
    def is_monolithic(self) -> bool:
        """Return False: vLLM's router chooses, and `apply` gets its choice."""
        return False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate nothing."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """Return None: there is no local kernel to configure."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the weighted sum of the routed experts [T, H] of `x` [T, H], in its dtype and on its device."""
        torch.ops.deepsplit.dispatch(x, topk_weights, topk_ids, layer.layer_name)
        shared_TH = None
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            shared_TH = shared_experts._output[shared_experts._output_idx]  # the runner takes it out by `output`
        output_TH = torch.empty_like(x)
        torch.ops.deepsplit.collect(output_TH, x, shared_TH, layer.layer_name)
        return output_TH
