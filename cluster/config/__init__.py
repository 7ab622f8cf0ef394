"""The configuration tree and its readers."""

from cluster.config.admission import AdmissionConfig, ClassObjective
from cluster.config.attention import AttentionAutoscaling, AttentionConfig
from cluster.config.dispatch import DispatchConfig
from cluster.config.experts import ExpertAutoscaling, ExpertPool, ExpertsConfig
from cluster.config.gateway import GatewayConfig
from cluster.config.model import ModelConfig
from cluster.config.operations import LoggingConfig, MonitoringConfig, RayConfig
from cluster.config.section import AutoDtype, Dtype, NodeSelector, PinCores, Section, conflict, section_type
from cluster.config.tls import InternalTlsConfig, ServerTls
from cluster.config.tree import Config

__all__ = [
    "AdmissionConfig",
    "AttentionAutoscaling",
    "AttentionConfig",
    "AutoDtype",
    "ClassObjective",
    "Config",
    "DispatchConfig",
    "Dtype",
    "ExpertAutoscaling",
    "ExpertPool",
    "ExpertsConfig",
    "GatewayConfig",
    "InternalTlsConfig",
    "LoggingConfig",
    "ModelConfig",
    "MonitoringConfig",
    "NodeSelector",
    "PinCores",
    "RayConfig",
    "Section",
    "ServerTls",
    "conflict",
    "section_type",
]
