"""DeepSeek sparse attention on CPU: each new token attends to the positions that the lightning indexer chose for it.

Source of the equations: DeepSeek-V3.2-Exp's report. Exact, in the latent form of MLA (multi-query attention).

Legend: T rows (new tokens), N heads, S positions of one request, K chosen positions of a row, C width of a cached row
(latent and rotary part), L latent width.
"""

from __future__ import annotations

from typing import Any

import torch

from deployments.attention.cpu.indexer import CpuIndexer
from deployments.attention.cpu.paged_rows import PagedBackend, PagedRows
from deployments.attention.vllm_internals import CPUMLAImpl, MultiHeadLatentAttentionWrapper, current_platform

_ELEMENTS = 16 << 20  # of an intermediate tensor at most: float32, 64 MiB


class SparseMLABackend(PagedBackend):
    """What `MLAAttention` gets for a sparse layer."""

    @staticmethod
    def get_name() -> str:
        """Return what vLLM's log calls it."""
        return "CPU_MLA_SPARSE"

    @staticmethod
    def get_impl_cls() -> type[SparseMLAImpl]:
        """Return what computes."""
        return SparseMLAImpl

    @classmethod
    def is_mla(cls) -> bool:
        """Return True."""
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        """Return True."""
        return True


class SparseMLAImpl(CPUMLAImpl):
    """One layer's attention. Its cache is written as vLLM's reference backend does."""

    is_sparse = True
    supports_dense_mha_prefill = False

    def __init__(self, *args: Any, topk_indices_buffer: torch.Tensor, **kwargs: Any) -> None:
        """`topk_indices_buffer`: int32 [T, K], the chosen positions of each row of the step, -1 for none; all layers
        share it.
        """
        super().__init__(*args, **kwargs)
        self._chosen_TK = topk_indices_buffer

    def record_logical_topk_ready(self) -> None:
        """Nothing overlaps here."""

    def forward_mqa(
        self, q: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: PagedRows, layer: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention of queries [T, N, C] to the cache [blocks, positions, C] -> [T, N, L]."""
        q_TNC = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        out_TNL = q_TNC.new_empty(*q_TNC.shape[:2], self.kv_lora_rank)
        cache_BSC = kv_c_and_k_pe_cache
        for request, rows, length in attn_metadata.requests():
            if length <= self._chosen_TK.shape[1]:  # all positions are chosen
                self._dense(q_TNC[rows], attn_metadata.cached(cache_BSC, request, length), out_TNL[rows])
            else:
                self._sparse(q_TNC, cache_BSC, attn_metadata, request, rows, out_TNL)
        return out_TNL, None

    def _dense(self, q_TNC: torch.Tensor, cached_SC: torch.Tensor, out_TNL: torch.Tensor) -> None:
        length, rows = len(cached_SC), len(q_TNC)
        step = max(1, _ELEMENTS // (self.num_heads * length))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            seen = length - rows + part.stop
            scores_TNS = (q_TNC[part] @ cached_SC[:seen].T).float() * self.scale
            own_T = torch.arange(seen - (part.stop - first), seen)
            scores_TNS.masked_fill_((torch.arange(seen) > own_T[:, None])[:, None], -torch.inf)
            weights_TNS = scores_TNS.softmax(-1).to(cached_SC.dtype)
            out_TNL[part] = weights_TNS @ cached_SC[:seen, : self.kv_lora_rank]

    def _sparse(
        self, q_TNC: torch.Tensor, cache_BSC: torch.Tensor, paged: PagedRows, request: int, rows: slice,
        out_TNL: torch.Tensor,
    ) -> None:  # fmt: skip
        flat_SC = cache_BSC.flatten(0, 1)
        step = max(1, _ELEMENTS // (self._chosen_TK.shape[1] * flat_SC.shape[1]))
        for first in range(rows.start, rows.stop, step):
            part = slice(first, min(first + step, rows.stop))
            chosen_TK = self._chosen_TK[part].long()
            none_TK = chosen_TK < 0
            latents_TKC = flat_SC[paged.places(request, chosen_TK.clamp(min=0))]
            scores_TNK = torch.bmm(q_TNC[part], latents_TKC.transpose(1, 2)).float() * self.scale
            scores_TNK.masked_fill_(none_TK[:, None], -torch.inf)
            weights_TNK = scores_TNK.softmax(-1).to(flat_SC.dtype)
            out_TNL[part] = torch.bmm(weights_TNK, latents_TKC[..., : self.kv_lora_rank])


class SparseMLALayer(MultiHeadLatentAttentionWrapper):
    """vLLM's MLA layer, whose indexer on CPU is ours; a layer without one is built as it is."""

    def __init__(self, *args: Any, mla_modules: Any = None, **kwargs: Any) -> None:
        """As vLLM's, whose ninth argument `mla_modules` is."""
        if mla_modules is None:
            *first, mla_modules = args[:9]
            args = (*first, mla_modules, *args[9:])
        else:
            kwargs["mla_modules"] = mla_modules
        if mla_modules.indexer is not None and current_platform.is_cpu():
            mla_modules.indexer = CpuIndexer(mla_modules.indexer)
        super().__init__(*args, **kwargs)
