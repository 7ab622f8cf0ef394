"""vLLM's CPU platform, with sparse attention, and a prefill whose memory grows with the prompt and not with its square.

For our engines it also leaves on what vLLM turns off for MLA models, chunked prefill and prefix caching: its reference
backend computes both right (`tests/integration/test_parity.py`).
"""

from __future__ import annotations

from typing import Any

from deployments.attention.vllm_internals import CpuPlatform  # other names of vLLM's are not there yet

_SPARSE_BACKEND = "deployments.attention.cpu.sparse_mla.SparseMLABackend"


class SplitCpuPlatform(CpuPlatform):
    """One per process; vLLM makes it."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Return the class of an attention backend, by name."""
        if attn_selector_config.use_sparse:
            return _SPARSE_BACKEND
        name: str = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return name

    @classmethod
    def get_mla_prefill_backend_cls(cls, mla_selector_config: Any) -> type:
        """Return what computes a prompt's attention."""
        from deployments.attention.cpu.mla_prefill import LinearMemoryPrefill

        return LinearMemoryPrefill

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Adapt the engine's configuration to this platform."""
        from deployments.attention.settings import settings_of

        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        asked = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
        super().check_and_update_config(vllm_config)
        if settings_of(vllm_config) is not None:
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = asked
