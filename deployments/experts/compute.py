"""The arithmetic of the experts: SwiGLU of the held ones, weighted and summed per row.

Legend: T rows, K experts per token, N held experts of the layer, P pairs of row and held expert, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.errors import FrameError, StalePlacement
from deployments.experts.forms import Form
from deployments.experts.kernels import Pairs, fused_experts, gemm_per_expert
from deployments.experts.many_rows import few_and_many
from deployments.experts.weights import ExpertWeights, LayerExperts

if TYPE_CHECKING:
    from deployments.experts.gpu_turns import GpuTurns

_NOT_ASKED, _NOT_HELD, _NO_EXPERT = -1, -2, -3  # in the lookup table, where there is no held expert
_PAIR = 1 / 6  # reading an expert's weights takes about as long as computing 6 more rows with them (bfloat16, 2 cores)
_IDS = 1 << 16  # int16 ids, looked up as uint16

_Kernel = Callable[[LayerExperts, torch.Tensor, Pairs], torch.Tensor]
_KERNELS: dict[Form, _Kernel] = {
    Form.FLOAT32: gemm_per_expert, Form.FLOAT16: gemm_per_expert, Form.BFLOAT16: gemm_per_expert,
    Form.VECTOR_BFLOAT16: fused_experts, Form.PACKED_BFLOAT16: fused_experts,
    Form.PACKED_INT8: fused_experts, Form.PACKED_FP8: fused_experts,
}  # fmt: skip
_GROUPED = (Form.GROUPED_BFLOAT16, Form.GROUPED_FP8)  # whose turns GpuTurns computes


class ExpertCompute:
    """Computes one worker's experts. Not thread-safe; the server computes one batch at a time."""

    def __init__(
        self,
        weights: ExpertWeights,
        threads: int,
        on_rows: Callable[[np.ndarray], None] = lambda rows_N: None,
        many_rows: int | None = None,
    ) -> None:
        """Computes all of `weights` until `serve` says which of them are held. `on_rows` is called with each batch's
        number of rows per place of the layer, int64 [N].

        `many_rows`: packed bfloat16 experts with as many rows in a batch are computed in slices; None: no expert is.
        """
        torch.set_num_threads(threads)
        self._kernels = dict(_KERNELS)
        if many_rows is not None:
            self._kernels[Form.PACKED_BFLOAT16] = partial(few_and_many, many_rows=many_rows)
        self._on_rows = on_rows
        self._layers = weights.layers
        self._num_experts = weights.num_experts
        self._turn = threading.Lock()
        self._local: dict[int, np.ndarray] = {}
        self.serve({layer: experts.ids for layer, experts in weights.layers.items()})
        self._gpu = _gpu_turns(self._layers)
        # Computed so far, in experts: each that a turn asks for, and _PAIR for each of its rows, so that hosts compare
        # whether their experts have many rows or few.
        self.work = 0.0
        self.failure: str | None = None  # why nothing more can be computed: the worker must be replaced

    def serve(self, held: Mapping[int, Sequence[int]]) -> None:
        """Compute these experts, by layer, and no others. Returns when nothing is computed by an earlier call's. The
        caller may be another thread than the one that computes.
        """
        self._local = _lookup_tables(self._layers, held, self._num_experts)
        with self._turn:
            pass

    def forward(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """sum_k weights[t, k] * expert_k(hidden[t]) -> [T, H] (DeepSeek-V3 report, equations 12 and 13).

        `expert_ids_TK` integer, global, -1 where an expert is another worker's; `weights_TK` float32. The result is
        float32, or bfloat16, rounded once, from vLLM's kernels and grouped GEMMs; it is valid until the next call.
        Raises FrameError for an unknown id or shape, StalePlacement for a layer or an expert that is not held here.
        """
        with self._turn, torch.inference_mode():
            return self._forward(layer, hidden_TH, expert_ids_TK, weights_TK)

    def _forward(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        experts = self._layers.get(layer)
        if experts is None:
            asked = tuple(expert for expert in np.unique(expert_ids_TK.numpy()).tolist() if expert >= 0)
            raise StalePlacement(
                f"layer {layer} is not held by this worker, which has routed experts of layers {_ranges(self._layers)}",
                asked,
            )
        _check_shapes(layer, experts.hidden_size, hidden_TH, expert_ids_TK, weights_TK)
        local = self._local_ids(layer, expert_ids_TK.numpy()).ravel()
        at_P = np.flatnonzero(local >= 0)
        if len(at_P) == 0:
            return torch.zeros(hidden_TH.shape, dtype=torch.float32)
        local_P = local[at_P]
        pairs = Pairs(at_P // expert_ids_TK.shape[1], local_P, weights_TK.float().numpy().ravel()[at_P])
        rows_N = np.bincount(local_P, minlength=len(experts.ids))
        self.work += np.count_nonzero(rows_N) + _PAIR * len(local_P)
        self._on_rows(rows_N)
        if not experts.down.is_cuda:
            return self._kernels[experts.form](experts, hidden_TH.to(experts.compute_dtype), pairs)
        try:
            return self._on_gpu(experts, hidden_TH, pairs, expert_ids_TK.shape[1])
        except RuntimeError:
            self.failure = _gpu_failure()
            raise

    def _on_gpu(
        self, experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs, experts_per_row: int
    ) -> torch.Tensor:
        if self._gpu is not None:
            return self._gpu.forward(experts, hidden_TH, pairs, experts_per_row)
        hidden_TH = hidden_TH.to(device=experts.down.device, dtype=experts.compute_dtype)
        return self._kernels[experts.form](experts, hidden_TH, pairs).cpu()

    def _local_ids(self, layer: int, ids_TK: np.ndarray) -> np.ndarray:
        """Return each pair's index among the held experts, -1 for those of other workers."""
        if ids_TK.dtype != np.int16:
            if ids_TK.size and not -1 <= ids_TK.min() <= ids_TK.max() < self._num_experts:
                raise self._unknown_id()
            ids_TK = ids_TK.astype(np.int16)
        local_TK = self._local[layer][ids_TK.view(np.uint16)]
        if local_TK.size and (worst := local_TK.min()) < _NOT_ASKED:
            if worst == _NO_EXPERT:
                raise self._unknown_id()
            absent = tuple(np.unique(ids_TK[local_TK == _NOT_HELD]).tolist())
            raise StalePlacement(
                f"layer {layer}: expert(s) {', '.join(map(str, absent[:8]))}{'...' if len(absent) > 8 else ''} not "
                f"held by this worker; split again with a fresh table",
                absent,
            )
        return local_TK

    def _unknown_id(self) -> FrameError:
        return FrameError(f"expert ids must be from -1 to {self._num_experts - 1}")


def _gpu_turns(layers: Mapping[int, LayerExperts]) -> GpuTurns | None:
    """Return what computes grouped forms, its kernels compiled. Only here is Triton imported: CPU hosts have none."""
    largest = max(layers.values(), key=lambda layer: len(layer.ids), default=None)
    if largest is None or largest.form not in _GROUPED or not largest.ids:
        return None
    from deployments.experts.gpu_turns import GpuTurns

    turns = GpuTurns(largest.form, largest.hidden_size, largest.down.shape[2], len(largest.ids))
    turns.compile(largest)
    return turns


def _gpu_failure() -> str | None:
    """After an error: whether the GPU is lost to this process, as it is after a fault in a kernel."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the GPU refuses every call since a kernel failed: {error}"
    return None


def _lookup_tables(
    layers: Mapping[int, LayerExperts], held: Mapping[int, Sequence[int]], num_experts: int
) -> dict[int, np.ndarray]:
    """Return each layer's places of its held experts by global id as uint16; layers that hold the same share one."""
    made: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
    tables = {}
    for layer, experts in layers.items():
        key = experts.ids, tuple(held.get(layer, ()))
        if key not in made:
            table = np.full(_IDS, _NO_EXPERT, dtype=np.int16)
            table[:num_experts] = _NOT_HELD
            table[_IDS - 1] = _NOT_ASKED
            place = {expert: local for local, expert in enumerate(experts.ids)}
            table[list(key[1])] = [place[expert] for expert in key[1]]
            made[key] = table
        tables[layer] = made[key]
    return tables


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


def _ranges(layers: Mapping[int, LayerExperts]) -> str:
    numbers = sorted(layers)
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"
