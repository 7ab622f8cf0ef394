"""An expert worker without Ray: weights, kernels and gRPC server put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from cluster.config import Config
from cluster.model.spec import load_checkpoint_index, load_model_spec
from cluster.tls.certificates import load_internal
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import choose_form
from deployments.experts.weights import load_experts
from monitoring.expert_meter import ExpertMeter
from routing.tokens.channel import model_id
from routing.tokens.server import ExpertServer

_LONG_LOAD_BYTES = 1 << 30

logger = logging.getLogger(__name__)


class _Progress:
    """Logs each tenth of a long load."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        tenths = 10 * done_bytes // total_bytes
        if tenths > self._tenths and total_bytes > _LONG_LOAD_BYTES:
            self._tenths = tenths
            logger.info("experts: %d of %d MiB read", done_bytes >> 20, total_bytes >> 20)


class ExpertHost:
    """Loads a share of the experts (expert ids by layer) and serves them. Raises CheckpointError or StartupError."""

    def __init__(self, config: Config, experts: Mapping[int, tuple[int, ...]], meter: ExpertMeter) -> None:
        if config.internal_tls is not None:
            load_internal(config.internal_tls, time.time())  # before a load of minutes
        spec = load_model_spec(config.model.path)
        form = choose_form(config.experts.dtype, config.model.dtype, spec, config.experts.device)
        index = load_checkpoint_index(config.model.path)
        began_s = time.monotonic()
        weights = load_experts(index, spec, experts, form, config.experts.device, _Progress())
        meter.metrics.load.set(time.monotonic() - began_s)
        meter.metrics.weights.set(weights.nbytes)
        meter.metrics.held.set(sum(map(len, experts.values())))
        self.bytes_read = weights.bytes_read
        self.form = form.value
        logger.info("experts: %s", self.form)
        self._meter = meter
        self._compute = ExpertCompute(weights, config.experts.threads, on_rows=meter.gemms)
        self._server = ExpertServer(
            self._compute.forward,
            spec.hidden_size,
            model_id((config.model.path / "config.json").read_bytes(), spec.moe_layers),
            config.dispatch,
            config.internal_tls,
            meter=meter,
        )

    def measure(self) -> None:
        """Bring the metrics up to date, before a scrape."""
        self._meter.fold()
        self._meter.metrics.waiting.set(self._server.waiting())

    def failure(self) -> str | None:
        """Return why nothing more can be computed, as on a GPU after a fault; None while all is well."""
        return self._compute.failure

    def computing_s(self) -> float:
        """Return how long the present turn has been computed, 0 between turns. A hung kernel shows here."""
        return self._server.computing_s()

    def busy_s(self) -> float:
        """Return the seconds in which experts were computed, so far."""
        return self._server.busy_s()

    def start(self, host: str) -> str:
        """Listen on a free port of `host`; returns host:port."""
        return self._server.start(host)

    def stop(self, grace_s: float) -> None:
        """End streams and stop listening."""
        self._server.stop(grace_s)
