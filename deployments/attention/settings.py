"""What a Serve replica tells vLLM's worker process of the expert plane: our part of `additional_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.config import DispatchConfig, InternalTlsConfig, MonitoringConfig
from deployments.attention.vllm_internals import VllmConfig, get_current_vllm_config

SETTINGS_KEY = "deepsplit"


class RemoteExpertsSettings(BaseModel):
    """The settings that reach vLLM's worker process as `additional_config["deepsplit"]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    placement_file: Path  # the table, replaced atomically by the Serve replica
    model_path: Path
    dispatch: DispatchConfig
    internal_tls: InternalTlsConfig | None = None
    monitoring: MonitoringConfig = MonitoringConfig(host="127.0.0.1", port=0)
    node: str = "127.0.0.1"  # as the replica calls its host
    replica_id: str = ""
    start_timeout_s: float = 600.0  # longest wait for the first table

    def plane_file(self, rank: int) -> Path:
        """Return the file in which a tensor-parallel rank tells its Serve replica how long rows wait at the expert
        workers.
        """
        return self.placement_file.with_name(f"expert_plane-{rank}")

    def routed_tokens_file(self, rank: int) -> Path:
        """Return the file in which a rank tells its Serve replica how many tokens each expert had."""
        return self.placement_file.with_name(f"routed_tokens-{rank}")

    def scrape_file(self, rank: int) -> Path:
        """Return the file in which a rank tells its Serve replica where its metrics are (deployments.hosting.scrape).
        """
        return self.placement_file.with_name(f"scrape-{rank}")

    def as_additional_config(self) -> dict[str, Any]:
        """Return the mapping for vLLM's `additional_config`."""
        return {SETTINGS_KEY: self.model_dump(mode="json")}


def current_settings() -> RemoteExpertsSettings | None:
    """Return the settings of the engine that is being built; None if it is not split."""
    return settings_of(get_current_vllm_config())


def settings_of(vllm_config: VllmConfig) -> RemoteExpertsSettings | None:
    """Return our part of an engine's `additional_config`; None if it is not split."""
    additional = vllm_config.additional_config
    raw = additional.get(SETTINGS_KEY) if isinstance(additional, dict) else None
    return None if raw is None else RemoteExpertsSettings.model_validate(raw)
