"""The arithmetic of the experts: SwiGLU of the held ones, weighted and summed per row.

Legend: T rows, K experts per token, N held experts of the layer, P rows of one expert, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from cluster.errors import FrameError, StalePlacement
from deployments.experts.kernels import Rows, add_grouped, add_torch, add_vllm, pack, vllm_fits
from deployments.experts.weights import ExpertWeights, LayerExperts

# Weights up to this size are held in both layouts: a small model's decode step is then about 10x faster, and its memory
# does not matter. A large model gains 1.5x at best: not worth twice the memory (benchmarks/expert_kernels.py).
_BOTH_BYTES = 256 << 20
_VLLM_ROWS = 32  # mean rows per expert up to which vLLM's kernel is used; same benchmark


class ExpertCompute:
    """Computes one worker's experts. Not thread-safe; the server computes one batch at a time."""

    def __init__(
        self,
        weights: ExpertWeights,
        threads: int,
        kernel: Literal["auto", "torch"] = "auto",
        on_rows: Callable[[list[int]], None] = lambda rows_N: None,
    ) -> None:
        """`kernel="auto"` also holds small models' weights (_BOTH_BYTES) in the layout of vLLM's kernel, if vLLM is
        installed. `on_rows` is called with each batch's number of rows per held expert of the layer.
        """
        torch.set_num_threads(threads)
        self._on_rows = on_rows
        self._layers = weights.layers
        self._local = {layer: _local_of(experts, weights.num_experts) for layer, experts in weights.layers.items()}
        self._packed: dict[int, LayerExperts] = {}  # a second copy, for few rows
        if kernel == "auto" and weights.nbytes <= _BOTH_BYTES and all(map(vllm_fits, weights.layers.values())):
            self._packed = {layer: pack(experts) for layer, experts in weights.layers.items()}

    @torch.inference_mode()
    def forward(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """sum_k weights[t, k] * expert_k(hidden[t]) -> float32 [T, H] (DeepSeek-V3 report, equations 12 and 13).

        `expert_ids_TK` int32, global, -1 where an expert is another worker's; `weights_TK` float32. Activations are in
        the experts' dtype, the sum in float32. Raises FrameError for an unknown layer, id or shape, StalePlacement for
        an expert that is not held here.
        """
        experts = self._layers.get(layer)
        if experts is None:
            raise FrameError(f"unknown layer {layer}; this worker has routed experts of layers {_ranges(self._layers)}")
        _check_shapes(layer, experts.down_NHI.shape[1], hidden_TH, expert_ids_TK, weights_TK)
        local_TK = self._local_ids(layer, expert_ids_TK)
        device, dtype = experts.down_NHI.device, experts.down_NHI.dtype
        hidden_TH = hidden_TH.to(device=device, dtype=dtype)
        output_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=device)
        rows = _rows(local_TK, weights_TK, len(experts.ids), device)
        self._on_rows(rows.counts_N)
        packed = self._packed.get(layer)
        if packed is not None and rows.per_expert <= _VLLM_ROWS and len(rows.tokens_P):
            add_vllm(packed, hidden_TH, rows, output_TH)
        elif device.type == "cuda" and dtype is torch.bfloat16 and len(rows.tokens_P):
            add_grouped(experts, hidden_TH, rows, output_TH)
        else:
            add_torch(experts, hidden_TH, rows, output_TH)
        return output_TH.cpu()

    def _local_ids(self, layer: int, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        local_of = self._local[layer]
        if expert_ids_TK.numel() and not -1 <= int(expert_ids_TK.min()) <= int(expert_ids_TK.max()) < len(local_of) - 1:
            raise FrameError(f"expert ids must be from -1 to {len(local_of) - 2}")
        local_TK = local_of[expert_ids_TK.long()]  # -1 indexes the last entry, which is "none"
        unknown = expert_ids_TK[(local_TK < 0) & (expert_ids_TK >= 0)]
        if len(unknown):
            raise StalePlacement(
                f"layer {layer}: expert {int(unknown[0])} is not held by this worker; split again with a fresh table"
            )
        return local_TK


def _rows(local_TK: torch.Tensor, weights_TK: torch.Tensor, num_held: int, device: torch.device) -> Rows:
    local = local_TK.reshape(-1)
    pairs = (local >= 0).nonzero().squeeze(1)
    local_P, order = torch.sort(local[pairs], stable=True)
    pairs = pairs[order]
    tokens_P = pairs // max(1, local_TK.shape[1])
    scale_P = weights_TK.reshape(-1)[pairs].float()
    counts_N = torch.bincount(local_P, minlength=num_held).tolist()
    return Rows(tokens_P.to(device), local_P, scale_P.to(device), counts_N)


def _check_shapes(
    layer: int, hidden_size: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> None:
    if hidden_TH.ndim != 2 or hidden_TH.shape[1] != hidden_size:
        raise FrameError(f"layer {layer}: hidden states are {list(hidden_TH.shape)}, not [tokens, {hidden_size}]")
    if ids_TK.ndim != 2 or ids_TK.shape != weights_TK.shape or len(ids_TK) != len(hidden_TH):
        raise FrameError(
            f"layer {layer}: expert ids {list(ids_TK.shape)} and weights {list(weights_TK.shape)} do not fit "
            f"{len(hidden_TH)} tokens"
        )


def _local_of(experts: LayerExperts, num_experts: int) -> torch.Tensor:
    """Index in the held experts by global id, -1 where not held; one more entry than experts, for the id -1."""
    local = torch.full((num_experts + 1,), -1, dtype=torch.int64)
    local[list(experts.ids)] = torch.arange(len(experts.ids))
    return local


def _ranges(layers: object) -> str:
    numbers = sorted(layers)  # type: ignore[call-overload]
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"
