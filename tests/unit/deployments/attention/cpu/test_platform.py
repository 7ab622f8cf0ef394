"""vLLM takes our CPU platform, which leaves on for our engines what vLLM turns off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.attention.cpu.platform import SplitCpuPlatform
from deployments.attention.cpu.platform_plugin import platform
from deployments.attention.settings import SETTINGS_KEY
from deployments.attention.vllm_internals import CpuPlatform, current_platform


def test_vllm_has_found_it() -> None:
    assert type(current_platform).__name__ == "SplitCpuPlatform"
    assert platform() == "deployments.attention.cpu.platform.SplitCpuPlatform"
    assert current_platform.is_cpu()


def test_sparse_attention_has_a_backend_and_all_else_is_vllms() -> None:
    assert SplitCpuPlatform.get_attn_backend_cls(None, SimpleNamespace(use_sparse=True)).endswith("SparseMLABackend")
    dense = SimpleNamespace(use_sparse=False, use_mla=False)
    assert SplitCpuPlatform.get_attn_backend_cls(None, dense) == CpuPlatform.get_attn_backend_cls(None, dense)


@pytest.mark.parametrize(("additional", "left_on"), [({}, False), (None, False), ({SETTINGS_KEY: {
    "placement_file": "/p", "model_path": "/m", "dispatch": {}}}, True)])  # fmt: skip
def test_only_our_engines_keep_chunked_prefill(
    monkeypatch: pytest.MonkeyPatch, additional: dict[str, Any] | None, left_on: bool
) -> None:
    scheduler = SimpleNamespace(enable_chunked_prefill=True, max_num_batched_tokens=2048)
    cache = SimpleNamespace(enable_prefix_caching=True)

    def turned_off(config: Any) -> None:
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching = False, False
        scheduler.max_num_batched_tokens = 1 << 20

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", turned_off)
    config = SimpleNamespace(scheduler_config=scheduler, cache_config=cache, additional_config=additional)
    SplitCpuPlatform.check_and_update_config(config)
    kept = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
    assert kept == ((True, True, 2048) if left_on else (False, False, 1 << 20))
