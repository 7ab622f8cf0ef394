"""Grouped GEMMs on GPUs: the experts' SwiGLU over rows sorted by expert, and the weighted sum per token.

FP8 is DeepSeek-V3's own recipe (report, section 3.3): weights E4M3 with a float32 scale per 128 x 128 block, rows E4M3
with one per 128 columns, each product of 128 columns summed by the tensor cores and then scaled and added in float32.
Its error against float64 is that of rounding rows to E4M3 twice, 0.04 to 0.05 by relative norm; bfloat16's is 0.004.

Legend: T tokens, P pairs of token and expert, N held experts, H hidden size, I intermediate size, G groups of 128
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deployments.experts import gpu_kernels

GROUP = 128  # columns with a scale of their own, and rows and columns of a weight's block
_LARGEST = 448.0  # finite E4M3
_SUM_COLUMNS = 1024
_SUM_PAIRS = 8  # that are read at once: a token of DeepSeek-V3 has at most 8
_ROWS_LEFT = 64  # rows of a tile from which they are the left operand


@dataclass(frozen=True)
class Launch:
    """How the two GEMMs run for tiles of `rows`: warps and stages of each."""

    rows: int
    gate_up: tuple[int, int]
    down: tuple[int, int]


# By rows of a tile, least first. The fastest of those that were tried on an H100 at DeepSeek-V3's sizes: 1 to 1024 rows
# per expert, tiles of 16 to 128 rows, 4 and 8 warps, 3 to 6 stages (benchmarks/expert_kernels.py shows the result).
FP8_LAUNCHES = (Launch(16, (4, 4), (4, 4)), Launch(64, (8, 4), (4, 3)))
BFLOAT16_LAUNCHES = (Launch(16, (4, 4), (4, 4)), Launch(64, (8, 3), (4, 3)), Launch(128, (8, 3), (8, 3)))


class Scratch:
    """What is between the kernels, in the GPU's memory: allocated once, for at most so many rows and pairs."""

    def __init__(self, rows: int, pairs: int, hidden: int, inner: int, quantised: bool) -> None:
        dtype = torch.float8_e4m3fn if quantised else torch.bfloat16
        self.x_TH = torch.empty(rows if quantised else 0, hidden, dtype=dtype, device="cuda")
        self.x_scale_TG = torch.empty(len(self.x_TH), hidden // GROUP, device="cuda")
        self.inner_PI = torch.empty(pairs, inner, dtype=dtype, device="cuda")
        self.inner_scale_PG = torch.empty(pairs if quantised else 0, inner // GROUP, device="cuda")
        self.out_PH = torch.empty(pairs, hidden, device="cuda")


@dataclass(frozen=True)
class SortedPairs:
    """The pairs of a turn on the GPU: sorted by expert, and cut into tiles of one expert each. int32, but weights."""

    row_P: torch.Tensor  # of hidden_TH, in the order of experts
    place_P: torch.Tensor  # in that order, of the pairs in the order of tokens
    weight_P: torch.Tensor  # float32, in the order of tokens
    first_T: torch.Tensor  # T + 1: each token's first pair in the order of tokens
    tiles: torch.Tensor  # [number, 4]: expert, first pair in the order of experts, end, nothing


def weighted_sums(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    hidden_TH: torch.Tensor,
    pairs: SortedPairs,
    launch: Launch,
    scratch: Scratch,
    out_TH: torch.Tensor,
) -> None:
    """out_TH = sum over each token's pairs of weight x expert(hidden), on the current stream.

    `gate_up` [N, 2I, H] and `down` [N, H, I] are E4M3 with float32 `scales` [N, 2I/128, H/128] and [N, H/128, I/128],
    or bfloat16 with None. `hidden_TH` is bfloat16; `out_TH` is of any floating dtype, and rounded to once: pairs are
    kept and summed in float32. The same input gives the same bits: there are no atomic adds, and each token's pairs
    are added in their order.
    """
    (tokens, hidden), inner = hidden_TH.shape, down.shape[2]
    scaled = scales is not None
    x, x_scale, inner_scale = hidden_TH, hidden_TH, hidden_TH  # scales are not read without `scaled`
    up_scale, down_scale = scales or (hidden_TH, hidden_TH)
    if scaled:
        x, x_scale, inner_scale = scratch.x_TH, scratch.x_scale_TG, scratch.inner_scale_PG
        groups = hidden // GROUP
        gpu_kernels.quantise[(tokens, -(-groups // 8))](hidden_TH, x, x_scale, hidden, groups, _LARGEST)
    columns, across = (128 if inner % 128 == 0 else 64, 128 if hidden % 128 == 0 else 64)
    depth = GROUP if scaled else 64
    rows_left = launch.rows >= _ROWS_LEFT
    gpu_kernels.gate_up[(len(pairs.tiles) * (inner // columns),)](
        x, x_scale, gate_up, up_scale, scratch.inner_PI, inner_scale, pairs.row_P, pairs.tiles,
        hidden, inner, scaled, _LARGEST, rows_left, launch.rows, columns, depth,
        num_warps=launch.gate_up[0], num_stages=launch.gate_up[1],
    )  # fmt: skip
    gpu_kernels.down[(len(pairs.tiles) * (hidden // across),)](
        scratch.inner_PI, inner_scale, down, down_scale, scratch.out_PH, pairs.tiles,
        hidden, inner, scaled, rows_left, launch.rows, across, depth,
        num_warps=launch.down[0], num_stages=launch.down[1],
    )  # fmt: skip
    gpu_kernels.sum_pairs[(tokens, -(-hidden // _SUM_COLUMNS))](
        scratch.out_PH, pairs.place_P, pairs.weight_P, pairs.first_T, out_TH, hidden, _SUM_PAIRS, _SUM_COLUMNS
    )
