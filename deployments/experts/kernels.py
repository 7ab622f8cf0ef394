"""The kernels of an expert worker: torch's GEMMs per expert, grouped on GPUs, and on CPU vLLM's fused MoE kernel.

Measured by benchmarks/expert_kernels.py: on the experts of a small model, where calls cost more than arithmetic, vLLM's
kernel is 6-18x faster. On experts of DeepSeek-V3's size it gains up to 1.5x with one or two rows (`vec`), nothing with
AMX, and loses with many. It needs weights in a layout of its own.

Legend: T tokens, P rows (pairs of token and expert), N held experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from deployments.experts.weights import LayerExperts

# Row counts from which MKL's float32 GEMM gives a row the same bits whatever the rows beside it (one thread).
_STABLE_ROWS = 16
_ALIGNMENT = 32  # hidden and intermediate sizes must be multiples of it


@dataclass(frozen=True)
class Rows:
    """Pairs of token and expert, in order of expert, so that each expert's rows are one run."""

    tokens_P: torch.Tensor  # int64: row of hidden_TH
    local_P: torch.Tensor  # int64: index of the expert among the held ones, ascending
    scale_P: torch.Tensor  # float32
    counts_N: list[int]  # rows of each held expert

    @property
    def per_expert(self) -> float:
        """Return the mean number of rows of the experts that have any."""
        return len(self.tokens_P) / max(1, sum(count > 0 for count in self.counts_N))


def add_torch(experts: LayerExperts, hidden_TH: torch.Tensor, rows: Rows, output_TH: torch.Tensor) -> None:
    """Add scale x expert(hidden) to output (float32): two GEMMs for each expert with rows.

    On one CPU thread a token's float32 result does not depend on its batch: small groups are padded to _STABLE_ROWS.
    """
    start = 0
    for local, count in enumerate(rows.counts_N):
        if count == 0:
            continue
        tokens = rows.tokens_P[start : start + count]
        x_PH = hidden_TH[tokens]
        if count < _STABLE_ROWS and x_PH.dtype is torch.float32 and x_PH.device.type == "cpu":
            x_PH = functional.pad(x_PH, (0, 0, 0, _STABLE_ROWS - count))
        gate_PI, up_PI = functional.linear(x_PH, experts.gate_up_N2IH[local]).chunk(2, dim=-1)
        out_PH = functional.linear(functional.silu(gate_PI) * up_PI, experts.down_NHI[local])[:count]
        output_TH.index_add_(0, tokens, out_PH.float() * rows.scale_P[start : start + count, None])
        start += count


def add_grouped(experts: LayerExperts, hidden_TH: torch.Tensor, rows: Rows, output_TH: torch.Tensor) -> None:
    """Do the same in two grouped GEMMs over all experts: bfloat16 on GPUs, where a call per expert costs too much."""
    ends_N = torch.tensor(rows.counts_N).cumsum(0).to(output_TH.device, torch.int32)
    x_PH = hidden_TH[rows.tokens_P]
    gate_PI, up_PI = functional.grouped_mm(x_PH, experts.gate_up_N2IH.transpose(1, 2), offs=ends_N).chunk(2, dim=-1)
    out_PH = functional.grouped_mm(functional.silu(gate_PI) * up_PI, experts.down_NHI.transpose(1, 2), offs=ends_N)
    output_TH.index_add_(0, rows.tokens_P, out_PH.float() * rows.scale_P[:, None])


def add_vllm(packed: LayerExperts, hidden_TH: torch.Tensor, rows: Rows, output_TH: torch.Tensor) -> None:
    """Do the same in one call of vLLM's kernel, which sees each row as a token with one expert of weight 1."""
    hidden_PH = hidden_TH[rows.tokens_P]
    out_PH = torch.empty_like(hidden_PH)
    ones_P1 = torch.ones(len(hidden_PH), 1)
    local_P1 = rows.local_P[:, None].to(torch.int32)
    torch.ops._C.cpu_fused_moe(
        out_PH, hidden_PH, packed.gate_up_N2IH, packed.down_NHI, None, None, ones_P1, local_P1, False, "silu", _isa()
    )
    output_TH.index_add_(0, rows.tokens_P, out_PH.float() * rows.scale_P[:, None])


def vllm_fits(experts: LayerExperts) -> bool:
    """Return whether vLLM's kernel can run these experts here. Loads its operator library; False without vLLM."""
    down_NHI = experts.down_NHI
    return (
        down_NHI.dtype is torch.bfloat16
        and down_NHI.device.type == "cpu"
        and all(size % _ALIGNMENT == 0 for size in down_NHI.shape[1:])
        and load_vllm_operators()
    )


def pack(experts: LayerExperts) -> LayerExperts:
    """Return a copy of the weights in the layout of `add_vllm`."""
    packed = LayerExperts(experts.ids, torch.empty_like(experts.gate_up_N2IH), torch.empty_like(experts.down_NHI))
    isa = _isa()
    torch.ops._C.prepack_moe_weight(experts.gate_up_N2IH, packed.gate_up_N2IH, isa)
    torch.ops._C.prepack_moe_weight(experts.down_NHI, packed.down_NHI, isa)
    return packed


def _isa() -> str:
    """Return the name of vLLM's kernel for this processor; also asks the operating system for the use of AMX tiles."""
    return "amx" if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx() else "vec"


def load_vllm_operators() -> bool:
    """Register vLLM's CPU operators from its own library; never imports vllm, which takes many seconds."""
    if hasattr(torch.ops._C, "cpu_fused_moe"):
        return True
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    # Which of its libraries fits the processor: as vllm/platforms/cpu.py chooses.
    if not torch.cpu._is_avx2_supported():
        return False
    if not torch.cpu._is_avx512_supported():
        name = "_C_AVX2"
    else:
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    library = Path(spec.origin).parent / f"{name}.abi3.so"
    if not library.exists():
        return False
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops._C, "cpu_fused_moe")
