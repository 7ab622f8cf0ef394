"""What an expert worker's process holds: weights, kernels, gRPC server. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config import Config
from cluster.model import load_checkpoint_index, load_model_spec
from deployments.expert_compute import ExpertCompute
from deployments.expert_weights import load_experts
from routing.grpc_channel import model_id
from routing.server import ExpertServer


class ExpertHost:
    """Loads some experts (layer -> expert ids) and serves them. Raises CheckpointError."""

    def __init__(self, config: Config, experts: Mapping[int, tuple[int, ...]]) -> None:
        spec = load_model_spec(config.model.path)
        chosen = (config.experts.dtype, config.model.dtype, spec.dtype)
        dtype = next(name for name in chosen if name != "auto")
        weights = load_experts(load_checkpoint_index(config.model.path), spec, experts, dtype)
        self.bytes_read = weights.bytes_read
        self._server = ExpertServer(
            ExpertCompute(weights, config.experts.threads).forward,
            spec.hidden_size,
            model_id(spec.architecture, spec.hidden_size, spec.num_experts, spec.moe_layers),
            config.dispatch,
        )

    def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        return self._server.start(host)

    def stop(self, grace_s: float) -> None:
        """End streams and stop listening."""
        self._server.stop(grace_s)
