"""The one configuration tree: YAML in, frozen objects out, unknown keys rejected.

Every field carries its unit in its name and its meaning in `description`; `docs/configuration.md` is generated from
here. Nothing in deepsplit is tuned by a loose environment variable.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from cluster.config.admission import AdmissionConfig
from cluster.config.attention import AttentionConfig
from cluster.config.dispatch import DispatchConfig
from cluster.config.experts import ExpertsConfig
from cluster.config.gateway import GatewayConfig
from cluster.config.model import ModelConfig
from cluster.config.operations import LoggingConfig, MonitoringConfig, RayConfig
from cluster.config.section import Section, conflict
from cluster.config.tls import InternalTlsConfig


class Config(Section):
    """A whole deployment."""

    model: ModelConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    dispatch: DispatchConfig = Field(default_factory=DispatchConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)
    internal_tls: InternalTlsConfig | None = Field(
        None, description="Mutual TLS inside the cluster; plain TCP if not set.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    def own_host(self, node: str) -> str:
        """Address for ports that only the cluster needs, on the host with address `node`: a cluster of our own is this
        machine alone.
        """
        return "127.0.0.1" if self.ray.address is None else node

    @model_validator(mode="after")
    def _has_room_to_scale(self) -> Self:
        if self.attention.autoscaling is not None and self.ray.address is None:
            raise conflict(("attention", "autoscaling"), "a cluster of our own has room for attention.replicas only: "
                                                         "set ray.address, or a fixed attention.replicas")
        scaled = self.experts.autoscaling or any(pool.autoscaling for pool in self.experts.pools)
        if self.ray.address is None and scaled:
            raise conflict(("experts", "autoscaling"), "a cluster of our own has room for experts.workers only: set "
                                                       "ray.address, or a fixed experts.workers")
        return self

    @property
    def stop_within_s(self) -> float:
        """Longest clean stop, draining included."""
        return self.gateway.drain_timeout_s + self.ray.stop_timeout_s
