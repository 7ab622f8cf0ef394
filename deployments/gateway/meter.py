"""What requests do to the metrics, and the one line of the log at the end of each: without prompt, text or key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from itertools import product
from typing import TYPE_CHECKING

from cluster.config import AdmissionConfig
from cluster.errors import DeepsplitError, EngineRefused, Refusal
from deployments.gateway.paths import GENERATE_PATHS
from monitoring.metrics import MAX_TENANTS, OTHER_TENANTS, GatewayMetrics
from routing.requests.request import Grant, Priority, Tenant

if TYPE_CHECKING:
    from deployments.gateway.lease import Lease

OK, CANCELLED, CLIENT_ERROR, ENGINE_ERROR, BUG = "ok", "cancelled", "client_error", "engine_error", "internal_error"
_UNKNOWN = "unknown"  # the class of a request that did not come as far as admission
NOBODY = Tenant("unknown")  # whose a request is until its key has been looked at

logger = logging.getLogger(__name__)


class State(Enum):
    """Says where a request is."""

    ARRIVED = "arrived"  # its body is being read and looked at
    WAITING = "waiting"  # for admission
    RUNNING = "running"  # an attention replica has it
    ENDED = "ended"


def outcome_of(error: BaseException | None, status: int) -> str:
    """Returns how a request ended, for metrics. `status`: the replica's; 0 if it answered nothing."""
    if isinstance(error, EngineRefused):
        status = error.status  # which may come in the middle of an answer that began well
    elif isinstance(error, DeepsplitError):
        return error.outcome
    elif isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    elif error is not None:
        return BUG
    return OK if status < 400 else CLIENT_ERROR if status < 500 else ENGINE_ERROR


class RequestMeter:
    """Counts the requests of one gateway, at each step of their leases. Requests that generate nothing are only
    counted by how they ended.
    """

    def __init__(
        self, metrics: GatewayMetrics, objectives: AdmissionConfig, clock: Callable[[], float], model: str
    ) -> None:
        """`clock`: seconds, never going back. `model`: its name in the log."""
        self.clock = clock
        self._metrics = metrics
        self._model = model
        self._tenants: set[str] = set()
        self._objectives = objectives
        for label in (priority.label for priority in Priority):
            promised = objectives.objective(label)
            metrics.slo_threshold.labels(label, "ttft").set(promised.ttft_s)
            metrics.slo_threshold.labels(label, "tpot").set(promised.tpot_s)
            for gauge in (metrics.waiting, metrics.running):
                gauge.labels(label)
            for objective, met in product(("ttft", "tpot"), ("true", "false")):  # from 0 on, or rates miss the first
                metrics.slo_requests.labels(label, objective, met)

    def tenant_label(self, tenant: Tenant) -> str:
        """Returns the tenant's name; beyond the bound, one for all."""
        if tenant is not NOBODY and tenant.name not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER_TENANTS
            self._tenants.add(tenant.name)
        return tenant.name

    def waits(self, lease: Lease) -> None:
        """Counts a request that asks for admission."""
        if _generates(lease):
            self._metrics.waiting.labels(_class(lease)).inc()

    def admitted(self, lease: Lease, grant: Grant) -> None:
        """Counts a request that has leave to run."""
        if not _generates(lease):
            return
        label = _class(lease)
        self._metrics.waiting.labels(label).dec()
        self._metrics.running.labels(label).inc()
        self._metrics.queue.labels(label).observe(self.clock() - lease.arrived_s)
        if grant.would_refuse is not None:
            self._metrics.would_refuse.labels(grant.would_refuse, label).inc()

    def resent(self, continued: bool) -> None:
        """Counts a request that goes to a further attention replica."""
        self._metrics.resends.labels("continued" if continued else "again").inc()

    def first_token(self, lease: Lease, ttft_s: float) -> None:
        """Measures the first tokens of a request."""
        self._metrics.ttft.labels(_class(lease)).observe(ttft_s)
        self._judge(lease, "ttft", ttft_s)
        if lease.predicted_ttft_s is not None:
            self._metrics.prediction_error.labels(_class(lease)).observe(lease.predicted_ttft_s - ttft_s)

    def further_tokens(self, lease: Lease, pause_s: float) -> None:
        """Measures further tokens of a request, which came so long after those before."""
        self._metrics.inter_token.labels(_class(lease)).observe(pause_s)

    def end(self, lease: Lease, error: BaseException | None) -> None:
        """Counts and logs a request that is over, by an error or well. Its lease has the state in which it ended."""
        outcome, label, tenant = outcome_of(error, lease.status), _class(lease), self.tenant_label(lease.tenant)
        metrics, duration_s = self._metrics, self.clock() - lease.arrived_s
        self._log(lease, outcome, error, duration_s)
        if not _generates(lease):
            metrics.other_requests.labels(lease.head.path, outcome).inc()
            return
        metrics.requests.labels(outcome, label, tenant).inc()
        if isinstance(error, Refusal):
            metrics.refusals.labels(error.reason, error.plane, label).inc()
        if lease.state is State.WAITING:
            metrics.waiting.labels(label).dec()
        if lease.state is not State.RUNNING:
            return
        metrics.running.labels(label).dec()
        metrics.duration.labels(label).observe(duration_s)
        metrics.prompt_tokens.labels(label, tenant).inc(lease.prompt_tokens or 0)
        metrics.generated_tokens.labels(label, tenant).inc(lease.generated_tokens)
        further = lease.generated_tokens - lease.first_tokens
        if lease.first_s is not None and further > 0:
            tpot_s = (lease.last_s - lease.first_s) / further
            metrics.tpot.labels(label).observe(tpot_s)
            self._judge(lease, "tpot", tpot_s)

    def _log(self, lease: Lease, outcome: str, error: BaseException | None, duration_s: float) -> None:
        status = error.http_status if lease.status == 0 and isinstance(error, DeepsplitError) else lease.status
        fields = {
            "request_id": lease.head.request_id,
            "tenant": None if lease.tenant is NOBODY else lease.tenant.name,
            "class": None if lease.ask is None else _class(lease),
            "path": lease.head.path,
            "model": self._model,
            "outcome": outcome,
            "status": status or None,
            "reason": error.reason if isinstance(error, Refusal) else None,
            "plane": error.plane if isinstance(error, Refusal) else None,
            "prompt_tokens": lease.prompt_tokens,
            "generated_tokens": lease.generated_tokens,
            "ttft_s": None if lease.first_s is None else lease.first_s - lease.arrived_s,
            "duration_s": duration_s,
            "replicas": tuple(lease.sent_to),
            "resends": lease.resends,
        }
        logger.info("request ended", extra={"fields": fields})

    def _judge(self, lease: Lease, objective: str, seconds: float) -> None:
        promised = self._objectives.objective(_class(lease))
        met = seconds <= (promised.ttft_s if objective == "ttft" else promised.tpot_s)
        self._metrics.slo_requests.labels(_class(lease), objective, str(met).lower()).inc()


def _generates(lease: Lease) -> bool:
    return lease.head.path in GENERATE_PATHS


def _class(lease: Lease) -> str:
    return _UNKNOWN if lease.ask is None else lease.ask.priority.label
