"""The lightning indexer of DeepSeek-V3.2 in plain torch: which positions a new token attends to.

score[t, s] = sum_i weight[t, i] * relu(query[t, i] . key[s]), and the `index_topk` best of the positions up to t are
chosen. Source: DeepSeek-V3.2-Exp's report. vLLM's own computes in FP8 with GPU kernels.

Legend: T rows (new tokens), I heads of the indexer, D their width, S positions of one request, K chosen ones.
"""

from __future__ import annotations

from typing import Any

import torch

from cluster.errors import StartupError
from deployments.attention.cpu.paged_rows import PagedBackend, PagedRows
from deployments.attention.vllm_internals import (
    AttentionLayerBase,
    MLAAttentionSpec,
    SparseCacheRole,
    get_current_vllm_config,
    get_forward_context,
)

_ELEMENTS = 16 << 20  # of an intermediate tensor at most: float32, 64 MiB


class IndexerKeys(torch.nn.Module, AttentionLayerBase):
    """The keys of one layer, in the model's dtype."""

    def __init__(self, width: int, prefix: str) -> None:
        """`prefix`: the name of vLLM's own cache, whose place this one takes."""
        super().__init__()
        self.kv_cache, self._width, self._dtype = torch.tensor([]), width, torch.get_default_dtype()
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the memory, [blocks, 1, positions, D]."""
        self.kv_cache = kv_cache.squeeze(1)

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Return what memory it wants."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, max_tp_shards=1, head_size=self._width,
            dtype=self._dtype, cache_dtype_str="auto", cache_role=SparseCacheRole.INDEXER,
        )  # fmt: skip

    def get_attn_backend(self) -> type[PagedBackend]:
        """Return what makes its metadata."""
        return PagedBackend


class CpuIndexer(torch.nn.Module):
    """Has the weights of vLLM's indexer and writes to the same buffer."""

    def __init__(self, of: Any) -> None:
        """`of`: vLLM's, which the model's loader fills."""
        super().__init__()
        self._of = (of,)  # in a tuple: it is a module of the model already
        self._cache_name = of.k_cache.prefix
        self.topk_tokens = of.topk_tokens
        self._chosen_TK = of.topk_indices_buffer
        self.k_cache = IndexerKeys(of.head_dim, self._cache_name)

    def forward(self, hidden_states: torch.Tensor, qr: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
        """Cache the keys of hidden states [T, H], and choose positions for the queries that come of `qr`, the low-rank
        queries of the attention, [T, Q].
        """
        if torch.compiler.is_compiling():  # it would take the metadata of the moment for a constant
            raise StartupError("vLLM cannot compile sparse attention on CPU: leave enforce_eager out of engine_args")
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # vLLM measures memory
            return
        paged: PagedRows = metadata[self._cache_name]
        of, count = self._of[0], paged.num_actual_tokens
        key_and_weights = of.wk_weights_proj(hidden_states)[0]
        q_TID = of.wq_b(qr)[0].view(-1, of.n_head, of.head_dim)
        k_TD = of.k_norm(key_and_weights[:, : of.head_dim])
        q_rotary, k_rotary = rotary_emb(
            positions, q_TID[..., : of.rope_dim].contiguous(), k_TD[:, None, : of.rope_dim].contiguous()
        )
        q_TID = torch.cat([q_rotary.view(*q_TID.shape[:2], -1), q_TID[..., of.rope_dim :]], dim=-1)
        k_TD = torch.cat([k_rotary.view(len(k_TD), -1), k_TD[:, of.rope_dim :]], dim=-1)
        weights_TI = key_and_weights[:, of.head_dim :].float() * (of.softmax_scale * of.n_head_scale)
        cache_BSD, slots_T = self.k_cache.kv_cache, paged.slot_mapping[:count].long()
        written_T = slots_T >= 0
        cache_BSD.flatten(0, 1)[slots_T[written_T]] = k_TD[:count][written_T].to(cache_BSD.dtype)
        for request, rows, length in paged.requests():
            if length > self.topk_tokens:
                keys_SD = paged.cached(cache_BSD, request, length)
                self._choose(q_TID[rows].to(keys_SD.dtype), weights_TI[rows], keys_SD, self._chosen_TK[rows])

    def _choose(
        self, q_TID: torch.Tensor, weights_TI: torch.Tensor, keys_SD: torch.Tensor, chosen_TK: torch.Tensor
    ) -> None:
        length, rows = len(keys_SD), len(q_TID)
        step = max(1, _ELEMENTS // (q_TID.shape[1] * length))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            seen = length - rows + part.stop
            products_TIS = (q_TID[part] @ keys_SD[:seen].T).relu_().float()
            scores_TS = torch.bmm(weights_TI[part, None], products_TIS)[:, 0]
            own_T = torch.arange(seen - (part.stop - first), seen)
            scores_TS.masked_fill_(torch.arange(seen) > own_T[:, None], -torch.inf)
            best = scores_TS.topk(min(self.topk_tokens, seen), dim=-1)
            chosen_TK[part] = -1
            chosen_TK[part, : best.indices.shape[1]] = best.indices.where(best.values > -torch.inf, -1).int()
