"""Linear layers of the attention half with FP8 weights in blocks, on CPU: as DeepSeek-V3 is released.

vLLM computes them on CPUs with AMX only. Its operator for them, `fp8_scaled_mm_cpu`, needs no more than AVX-512 with
bfloat16. Where that is missing, or sizes do not fit, or the model computes in float32, the weights are dequantised when
they are loaded, to twice or four times their size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn import Parameter

from deployments.attention.vllm_internals import (
    BlockQuantScaleParameter,
    Fp8Config,
    LinearBase,
    LinearMethodBase,
    QuantizeMethodBase,
    create_fp8_scale_parameter,
    create_fp8_weight_parameter,
    is_layer_skipped,
    replace_parameter,
    validate_fp8_block_shape,
)
from deployments.hosting.fp8_blocks import dequantise, lift_low_blocks

_ROWS, _COLUMNS = 32, 128  # that the operator packs and scales together

logger = logging.getLogger(__name__)


class CpuFp8Config(Fp8Config):
    """What vLLM makes of `quantization_config` with `quant_method: fp8`."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return dtypes of hidden states."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer computes; routed experts are no matter of ours here."""
        if self.weight_block_size is None or not isinstance(layer, LinearBase):
            return super().get_quant_method(layer, prefix)
        skipped = is_layer_skipped(
            prefix=prefix, ignored_layers=self.ignored_layers, fused_mapping=self.packed_modules_mapping,
            match_mode=self.ignored_layers_match_mode,
        )  # fmt: skip
        return super().get_quant_method(layer, prefix) if skipped else BlockFp8Linear(self.weight_block_size)


class BlockFp8Linear(LinearMethodBase):
    """x @ (weight * scale of its block).T, in the dtype of x.

    No subclass of vLLM's Fp8LinearMethod: of those it reads `weight` itself, to take MLA's `kv_b_proj` apart; of any
    other it asks for the product with the identity, which is right for packed weights too.
    """

    def __init__(self, block: list[int]) -> None:
        """`block`: rows and columns that share a scale."""
        self._block = block

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Make `weight`, float8_e4m3fn [R, C], and `weight_scale_inv`, float32 [R / rows, C / columns], rounded up."""
        sizes, columns, loader = output_partition_sizes, input_size_per_partition, extra.get("weight_loader")
        layer.logical_widths, layer.weight_block_size, layer.orig_dtype = sizes, self._block, params_dtype
        layer.input_size_per_partition, layer.output_size_per_partition = columns, sum(sizes)
        validate_fp8_block_shape(layer, input_size, output_size, columns, sizes, self._block)
        layer.register_parameter("weight", create_fp8_weight_parameter(sum(sizes), columns, loader))
        scale = create_fp8_scale_parameter(BlockQuantScaleParameter, sizes, columns, self._block, loader)
        layer.register_parameter("weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight, or dequantise it."""
        weight_RC, scale = layer.weight.data, layer.weight_scale_inv.data
        rows, columns = self._block
        layer.packed = (
            hasattr(torch.ops._C, "fp8_scaled_mm_cpu") and layer.orig_dtype == torch.bfloat16
            and len(weight_RC) % _ROWS == 0 and weight_RC.shape[1] % _COLUMNS == 0
            and rows % _ROWS == 0 and columns == _COLUMNS
        )  # fmt: skip
        if layer.packed:
            lift_low_blocks(weight_RC, scale, (rows, columns))  # the operator reads subnormals as other numbers
            made = torch.ops._C.convert_weight_packed(weight_RC)
            replace_parameter(layer, "weight_scale_inv", Parameter(scale, requires_grad=False))
        else:
            made = torch.empty(weight_RC.shape, dtype=layer.orig_dtype)
            dequantise(weight_RC, scale, (rows, columns), made)
            del layer.weight_scale_inv
            logger.log(
                logging.DEBUG if layer.orig_dtype == torch.float32 else logging.WARNING,
                "an FP8 weight of %s becomes %s: on CPU FP8 needs AVX-512 with bfloat16, blocks of 128 columns, rows "
                "that are a multiple of %d and columns that are one of %d",
                list(weight_RC.shape), layer.orig_dtype, _ROWS, _COLUMNS,
            )  # fmt: skip
        replace_parameter(layer, "weight", Parameter(made, requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., C] -> [..., R]."""
        if not layer.packed:
            return torch.nn.functional.linear(x, layer.weight, bias)
        rows_TC = x.reshape(-1, x.shape[-1])
        out_TR = torch.ops._C.fp8_scaled_mm_cpu(
            rows_TC, layer.weight, layer.weight_scale_inv, self._block, bias, x.dtype, True
        )
        return out_TR.view(*x.shape[:-1], -1)
