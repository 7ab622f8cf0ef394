"""Entry point of the group `vllm.platform_plugins`: vLLM asks it while it finds out on what it runs."""

from __future__ import annotations

from deployments.attention.vllm_internals import cpu_platform_plugin

_VLLMS = "vllm.platforms.cpu.CpuPlatform"


def platform() -> str | None:
    """Return the name of our class where vLLM would take its CPU platform, None on any other."""
    return "deployments.attention.cpu.platform.SplitCpuPlatform" if cpu_platform_plugin() == _VLLMS else None
