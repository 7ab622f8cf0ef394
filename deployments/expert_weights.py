"""Reads the routed experts of one worker, and nothing else, into the layout that `expert_compute` uses.

Legend: N held experts of a layer, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from cluster.checkpoint import CheckpointIndex, ExpertTensor, Projection, read_header
from cluster.errors import CheckpointError
from cluster.model import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerExperts:
    """The held experts of one layer. Slot n is expert `ids[n]`."""

    ids: tuple[int, ...]  # ascending
    gate_up_N2IH: torch.Tensor  # gate rows, then up rows
    down_NHI: torch.Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """All experts of one worker."""

    layers: Mapping[int, LayerExperts]
    num_experts: int
    bytes_read: int

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(layer.gate_up_N2IH.nbytes + layer.down_NHI.nbytes for layer in self.layers.values())


def load_experts(
    index: CheckpointIndex,
    spec: ModelSpec,
    assignment: Mapping[int, Sequence[int]],
    dtype: str,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExpertWeights:
    """Load the experts that `assignment` (layer -> expert ids) names, in `dtype`, one tensor at a time.

    FP8 block weights are dequantised on the way. `on_progress` gets layers done and layers in all. Raises
    CheckpointError if a shard is missing, truncated or corrupt, or a tensor is missing or has the wrong shape.
    """
    hidden, inter, wanted = spec.hidden_size, spec.moe_intermediate_size, DTYPES[dtype]
    layers: dict[int, LayerExperts] = {}
    with ExitStack() as stack:
        reader = _Reader(index, stack)
        for done, (layer, unsorted) in enumerate(assignment.items()):
            ids = tuple(sorted(unsorted))
            gate_up = torch.empty(len(ids), 2 * inter, hidden, dtype=wanted, device=device)
            down = torch.empty(len(ids), hidden, inter, dtype=wanted, device=device)
            for slot, expert in enumerate(ids):
                tensors = {(t.proj, t.kind): t for t in index.expert_tensors.get((layer, expert), ())}
                targets: dict[Projection, torch.Tensor] = {
                    "gate": gate_up[slot, :inter], "up": gate_up[slot, inter:], "down": down[slot]
                }  # fmt: skip
                for proj, target in targets.items():
                    weight = tensors.get((proj, "weight"))
                    if weight is None:
                        raise CheckpointError(
                            f"{index.path}: layer {layer} expert {expert} has no {proj} projection: the checkpoint is "
                            f"incomplete; download it again"
                        )
                    scale = tensors.get((proj, "scale"))
                    target.copy_(reader.read(weight, scale, spec, tuple(target.shape)))
            layers[layer] = LayerExperts(ids, gate_up, down)
            on_progress(done + 1, len(assignment))
        return ExpertWeights(layers, spec.num_experts, reader.bytes_read)


class _Reader:
    def __init__(self, index: CheckpointIndex, stack: ExitStack) -> None:
        self._index = index
        self._stack = stack
        self._open: dict[str, safe_open] = {}
        self.bytes_read = 0

    def read(
        self, weight: ExpertTensor, scale: ExpertTensor | None, spec: ModelSpec, shape: tuple[int, ...]
    ) -> torch.Tensor:
        tensor = self._tensor(weight)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{weight.name} in {self._index.path / weight.shard} has shape {tuple(tensor.shape)}, not {shape} as "
                f"config.json says: config and weights are of different models"
            )
        if tensor.dtype is not torch.float8_e4m3fn:
            return tensor
        if scale is None or spec.expert_quant is None:
            raise CheckpointError(
                f"{weight.name} is FP8 but has no weight_scale_inv, or config.json no quantization_config with "
                f"weight_block_size: the checkpoint is incomplete"
            )
        return dequantise(tensor, self._tensor(scale), spec.expert_quant.block_shape)

    def _tensor(self, wanted: ExpertTensor) -> torch.Tensor:
        path = self._index.path / wanted.shard
        try:
            if wanted.shard not in self._open:
                read_header(path)  # names what is wrong with a missing or truncated file
                self._open[wanted.shard] = self._stack.enter_context(safe_open(path, framework="pt"))
            tensor: torch.Tensor = self._open[wanted.shard].get_tensor(wanted.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{wanted.name} cannot be read from {path} ({error}): download it again") from None
        self.bytes_read += tensor.nbytes
        return tensor


def dequantise(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """FP8 weight [R, C] times its block's scale [ceil(R/b0), ceil(C/b1)] -> float32 [R, C].

    `weight_scale_inv` is multiplied, not divided by, in spite of its name (DeepSeek-V3's published weights).
    """
    rows, cols = weight.shape
    if tuple(scale_inv.shape) != (-(-rows // block[0]), -(-cols // block[1])):
        raise CheckpointError(
            f"weight_scale_inv of shape {tuple(scale_inv.shape)} does not fit a {rows}x{cols} weight in blocks of "
            f"{block[0]}x{block[1]}"
        )
    spread = scale_inv.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return weight.float() * spread
