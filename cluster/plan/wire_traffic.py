"""Bytes that one token puts on the wire between attention and experts: arithmetic for the plan.

The frame sizes are those of docs/wire-format.md; a test holds them against `routing.tokens.wire`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_ENTRY_BYTES = 6  # float32 weight + int16 expert id
_HEADER_BYTES = 40
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_SCALE_BYTES, _SCALE_BLOCK = 4, 128  # FP8 rows have a float32 scale per block of values


@dataclass(frozen=True)
class WireTraffic:
    """Payload per token; gRPC and TCP add a few percent, and frame headers are shared by all tokens of a batch."""

    dispatch_dtype: str
    combine_dtype: str
    workers_per_token: float  # expected number of distinct workers that a token is sent to, per layer
    dispatch_bytes_per_layer: float  # attention -> experts
    combine_bytes_per_layer: float  # experts -> attention
    layers: int  # MoE layers that one decoding step passes
    dispatch_bytes_per_step: float
    combine_bytes_per_step: float
    header_bytes_per_step: float  # for the whole batch, both ways, if every worker is met in every layer


def expected_workers(held: Sequence[int], num_experts: int, top_k: int, replicas: int) -> float:
    """Expected number of distinct workers among a token's `top_k` experts.

    `held` is experts per worker. Model: the router picks top_k of num_experts experts without replacement, uniformly;
    worker w answers for n_w = held_w / replicas of them (the copies share the work). The chance that w is not met
    is hypergeometric, C(E - n_w, k) / C(E, k) = prod_{i<k} (E - n_w - i) / (E - i), and by linearity the
    expectation is the sum over w of 1 minus that; the product form also holds between whole numbers n_w. It is an
    upper estimate: a router limited to few groups (DeepSeek-V3: 4 of 8) meets fewer workers, since a group's experts
    lie together.
    """
    assert 1 <= top_k <= num_experts
    met = 0.0
    for count in held:
        missed = 1.0
        for i in range(top_k):
            missed *= max(0.0, num_experts - count / replicas - i) / (num_experts - i)
        met += 1.0 - missed
    return met


def wire_traffic(
    workers_per_token: float,
    workers: int,
    hidden: int,
    top_k: int,
    layers: int,
    dispatch_dtype: str,
    combine_dtype: str,
) -> WireTraffic:
    """Traffic of a token that goes to each worker as `hidden` values and `top_k` entries (weight, expert id), and comes
    back as `hidden` values.
    """
    scales = -(-hidden // _SCALE_BLOCK) * _SCALE_BYTES if dispatch_dtype == "float8_e4m3fn" else 0
    dispatch = workers_per_token * (hidden * DTYPE_BYTES[dispatch_dtype] + scales + top_k * _ENTRY_BYTES)
    combine = workers_per_token * hidden * DTYPE_BYTES[combine_dtype]
    return WireTraffic(
        dispatch_dtype=dispatch_dtype,
        combine_dtype=combine_dtype,
        workers_per_token=workers_per_token,
        dispatch_bytes_per_layer=dispatch,
        combine_bytes_per_layer=combine,
        layers=layers,
        dispatch_bytes_per_step=dispatch * layers,
        combine_bytes_per_step=combine * layers,
        header_bytes_per_step=2.0 * _HEADER_BYTES * workers * layers,
    )
