"""Where the rows of a step and what was cached before are, for attention that computes each row by itself.

Legend: T rows (new tokens of all requests), S positions of one request, B blocks of the cache, C width of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deployments.attention.vllm_internals import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder

BLOCK = 16  # positions; what vLLM's CPU platform sets for MLA


@dataclass
class PagedRows(AttentionMetadata):
    """One step. To `MLAAttention` all of its rows are decode rows: keys and values stay in their latent form."""

    num_actual_tokens: int
    seq_lens: list[int]  # of each request, with its new tokens
    starts: list[int]  # first row of each request, and the end of the last
    block_table: torch.Tensor  # int32 [requests, blocks]
    slot_mapping: torch.Tensor  # int64 [T]: place of each new row in the cache, -1 for none
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0
    prefill: None = None
    decode: None = None

    def requests(self) -> Iterator[tuple[int, slice, int]]:
        """Yield the number, the rows and the length of each request that has rows."""
        for request, length in enumerate(self.seq_lens):
            rows = slice(self.starts[request], self.starts[request + 1])
            if rows.start < rows.stop:
                yield request, rows, length

    def cached(self, cache_BSC: torch.Tensor, request: int, length: int) -> torch.Tensor:
        """Return the first `length` rows of a request, [length, C]."""
        blocks = self.block_table[request, : -(-length // cache_BSC.shape[1])].long()
        return cache_BSC[blocks].flatten(0, 1)[:length]

    def places(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """Return where a request's positions are in the cache, seen as [B * BLOCK, C]; int64, the shape of `positions`.
        """
        return self.block_table[request].long()[positions // BLOCK] * BLOCK + positions % BLOCK


class PagedRowsBuilder(AttentionMetadataBuilder):
    """vLLM calls it once for each step and group of caches."""

    reorder_batch_threshold = None  # the order of requests is no matter

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> PagedRows:
        """Return what a step's layers need."""
        common = common_attn_metadata
        return PagedRows(
            common.num_actual_tokens, common.seq_lens.tolist(), common.query_start_loc_cpu.tolist(),
            common.block_table_tensor, common.slot_mapping, common.num_reqs, common.num_actual_tokens,
        )  # fmt: skip


class PagedBackend(AttentionBackend):
    """A cache of rows without attention of its own: the indexer's keys."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012  # as vLLM declares it

    @staticmethod
    def get_name() -> str:
        """Return what vLLM's log calls it."""
        return "CPU_PAGED_ROWS"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Return numbers of positions that a block may have."""
        return [BLOCK]

    @staticmethod
    def get_impl_cls() -> type:
        """Nobody asks: `MLAAttention` has another backend."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[PagedRowsBuilder]:
        """Return what makes the metadata."""
        return PagedRowsBuilder
