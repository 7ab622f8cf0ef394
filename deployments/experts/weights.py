"""The weights of held experts in the form that computes, and how much memory that takes.

Legend of shape suffixes: N places for experts of a layer, H hidden size, I intermediate size of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.model.spec import ModelSpec
from deployments.experts.forms import Form

PACKED = (Form.VECTOR_BFLOAT16, Form.PACKED_BFLOAT16, Form.PACKED_INT8, Form.PACKED_FP8)
FP8 = (Form.PACKED_FP8, Form.GROUPED_FP8)
# What an expert is brought to before it is packed, if it is.
DTYPES = {
    Form.FLOAT32: torch.float32, Form.FLOAT16: torch.float16, Form.BFLOAT16: torch.bfloat16,
    Form.GROUPED_BFLOAT16: torch.bfloat16, Form.VECTOR_BFLOAT16: torch.bfloat16, Form.PACKED_BFLOAT16: torch.bfloat16,
    Form.PACKED_INT8: torch.float32, Form.PACKED_FP8: torch.float8_e4m3fn, Form.GROUPED_FP8: torch.float8_e4m3fn,
}  # fmt: skip


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in the CPU's memory, to read and to write."""
    return memoryview(tensor.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerExperts:
    """The held experts of one layer, stacked: index n is expert `ids[n]`.

    Plain forms: `gate_up` [N, 2I, H] (gate rows, then up rows) and `down` [N, H, I], as `torch.nn.functional.linear`
    takes them. Packed forms: the same rows in an order, and for INT8 with a compensation, that only the kernel knows.
    Scales: INT8 float32 [N, 2I] and [N, H], one per row; FP8 float32 [N, 2I/128, H/128] and [N, H/128, I/128].
    """

    ids: tuple[int, ...]  # global ids, ascending
    form: Form
    hidden_size: int
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype in which the kernel takes hidden states."""
        return torch.bfloat16 if self.form in (*PACKED, *FP8) else self.gate_up.dtype

    @property
    def expert_bytes(self) -> int:
        """Return the size of one expert in memory."""
        stacks = (self.gate_up, self.down, self.gate_up_scale, self.down_scale)
        return sum(stack.nbytes // len(stack) for stack in stacks if stack is not None and len(stack))

    def parts_of(self, local: int) -> list[memoryview]:
        """Return the bytes of the expert with this index, which must be in the CPU's memory: its gate_up, its down, and
        their scales if there are.
        """
        stacks = (self.gate_up, self.down, self.gate_up_scale, self.down_scale)
        return [bytes_of(stack[local]) for stack in stacks if stack is not None]

    @property
    def nbytes(self) -> int:
        """Return the size in memory, if all are there."""
        return self.expert_bytes * len(self.ids)


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one worker's share."""

    layers: Mapping[int, LayerExperts]
    num_experts: int  # of the model, per layer
    bytes_read: int  # from the shards, their headers left out

    @property
    def nbytes(self) -> int:
        """Return the size in memory."""
        return sum(layer.nbytes for layer in self.layers.values())


def shapes_of(spec: ModelSpec, experts: int, form: Form) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the stacks of a layer with so many experts: gate_up, down, and scales if there are."""
    inner, hidden = spec.moe_intermediate_size, spec.hidden_size
    if form is Form.PACKED_INT8:
        return [
            ((experts, 2 * inner, hidden + 4), torch.int8), ((experts, hidden, inner + 4), torch.int8),  # an int32 more
            ((experts, 2 * inner), torch.float32), ((experts, hidden), torch.float32),
        ]  # fmt: skip
    stacks = [((experts, 2 * inner, hidden), DTYPES[form]), ((experts, hidden, inner), DTYPES[form])]
    if form in FP8:
        scales = ((experts, 2 * inner // 128, hidden // 128), (experts, hidden // 128, inner // 128))
        return [*stacks, *((shape, torch.float32) for shape in scales)]
    return [*stacks]


def layer_of(spec: ModelSpec, ids: tuple[int, ...], form: Form, stacks: Sequence[torch.Tensor]) -> LayerExperts:
    """Return a layer with room for `ids` in `stacks`, whose shapes are `shapes_of`."""
    return LayerExperts(ids, form, spec.hidden_size, *stacks)


def empty_layer(spec: ModelSpec, ids: tuple[int, ...], form: Form, device: str = "cpu") -> LayerExperts:
    """Return a layer with room for `ids` and nothing in it."""
    stacks = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes_of(spec, len(ids), form)]
    return layer_of(spec, ids, form, stacks)
