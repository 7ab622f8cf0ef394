"""What this host can compute with: vLLM's CPU operators, from its own library, and its GPU.

Never `import vllm`, which takes many seconds.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


@functools.cache
def load_operators() -> str:
    """Register the operators of the library that fits this processor. Returns its name; "" where there is none."""
    spec = importlib.util.find_spec("vllm")
    # Which of its libraries fits the processor: as vllm/platforms/cpu.py chooses.
    if spec is None or spec.origin is None or not torch.cpu._is_avx2_supported():
        return ""
    if not torch.cpu._is_avx512_supported():
        name = "_C_AVX2"
    else:
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    library = Path(spec.origin).parent / f"{name}.abi3.so"
    try:
        torch.ops.load_library(str(library))
    except OSError:  # not there, or without libnuma.so.1
        return ""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks the operating system for the tiles; the packed kernel uses them by itself
    return name


def has_packed_kernel() -> bool:
    """Return whether `fused_experts_cpu` is there: only for AVX-512 with bfloat16 (vLLM 0.32)."""
    return bool(load_operators()) and hasattr(torch.ops._C, "fused_experts_cpu")


def gpu_can(major: int, minor: int) -> bool:
    """Return whether there is a CUDA GPU of at least this compute capability, and Triton, which compiles for it."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (major, minor)
        and importlib.util.find_spec("triton") is not None
    )


def has_vector_kernel() -> bool:
    """Return whether `cpu_fused_moe` is there: for AVX2 and AVX-512."""
    return bool(load_operators()) and hasattr(torch.ops._C, "cpu_fused_moe")
