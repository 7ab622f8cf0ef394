"""Top-k routing for models that vLLM routes with a CUDA kernel (Qwen3-MoE, Mixtral), where there is no CUDA.

vLLM's own CPU experts route inside their kernel, so its CPU build lacks `_moe_C::topk_softmax` and `topk_sigmoid`. The
split asks vLLM's router, which calls them. DeepSeek's grouped top-k needs neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_SCHEMA = (
    "{name}(Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor(c!) token_expert_indices, Tensor gating_output, "
    "bool renormalize, Tensor? e_score_correction_bias, Tensor? is_padding) -> ()"
)


def define_missing(library: torch.library.Library) -> None:
    """Define the two ops for CPU tensors in `library` (namespace `_moe_C`), unless this vLLM has them."""
    for name, score in (("topk_softmax", _softmax), ("topk_sigmoid", torch.sigmoid)):
        if not hasattr(torch.ops._moe_C, name):
            library.define(_SCHEMA.format(name=name))
            library.impl(name, _TopK(score), "CPU")


def _softmax(gating_TE: torch.Tensor) -> torch.Tensor:
    return torch.softmax(gating_TE, dim=-1)


class _TopK:
    """Scores in float32; the k best by score (plus bias, which chooses but does not weigh)."""

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._score = score

    def __call__(
        self,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        token_expert_indices: torch.Tensor,
        gating_output: torch.Tensor,
        renormalize: bool,
        e_score_correction_bias: torch.Tensor | None,
        is_padding: torch.Tensor | None,
    ) -> None:
        assert is_padding is None, "VLLM_MOE_SKIP_PADDING is a CUDA setting"
        scores_TE = self._score(gating_output.float())
        choice_TE = scores_TE if e_score_correction_bias is None else scores_TE + e_score_correction_bias
        ids_TK = choice_TE.topk(topk_ids.shape[1], dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        topk_weights.copy_(weights_TK)
        topk_ids.copy_(ids_TK)
