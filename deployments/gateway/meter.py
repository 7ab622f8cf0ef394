"""One request's story at the gateway, told to the metrics and, at its end, to the log: without prompt, text or key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from itertools import product

from cluster.config import AdmissionConfig
from cluster.errors import DeepsplitError, EngineRefused, Refusal
from deployments.gateway.head import Head
from monitoring.metrics import MAX_TENANTS, OTHER_TENANTS, GatewayMetrics
from routing.requests.request import Grant, Priority, Tenant

OK, CANCELLED, CLIENT_ERROR, ENGINE_ERROR, BUG = "ok", "cancelled", "client_error", "engine_error", "internal_error"
_UNKNOWN = "unknown"  # whose it was, or of which class, had not been found out

logger = logging.getLogger(__name__)


class State(Enum):
    """Where a request is."""

    ARRIVED = "arrived"  # its body is being read and looked at
    WAITING = "waiting"  # for admission
    RUNNING = "running"  # an attention replica has it
    ENDED = "ended"


def outcome_of(error: BaseException | None, status: int) -> str:
    """How a request ended, for metrics: `status` is the replica's, 0 if it answered nothing."""
    if isinstance(error, EngineRefused):
        status = error.status  # which may come in the middle of an answer that began well
    elif isinstance(error, DeepsplitError):
        return error.outcome
    elif isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    elif error is not None:
        return BUG
    return OK if status < 400 else CLIENT_ERROR if status < 500 else ENGINE_ERROR


class RequestMeters:
    """Makes a meter for each request of one gateway."""

    def __init__(self, metrics: GatewayMetrics, objectives: AdmissionConfig, clock: Callable[[], float]) -> None:
        """`clock`: seconds, never going back."""
        self.metrics = metrics
        self.clock = clock
        self.objectives = objectives
        for label in (priority.label for priority in Priority):
            promised = objectives.objective(label)
            metrics.slo_threshold.labels(label, "ttft").set(promised.ttft_s)
            metrics.slo_threshold.labels(label, "tpot").set(promised.tpot_s)
            for gauge in (metrics.waiting, metrics.running):
                gauge.labels(label)
            for objective, met in product(("ttft", "tpot"), ("true", "false")):  # from 0 on, or rates miss the first
                metrics.slo_requests.labels(label, objective, met)
        self._tenants: set[str] = set()

    def request(self, head: Head, model: str, generates: bool) -> RequestMeter:
        """For a request that has just come."""
        return RequestMeter(self, head, model, generates)

    def tenant_label(self, name: str) -> str:
        """The tenant's name; one for all beyond the bound."""
        if name not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            return OTHER_TENANTS
        self._tenants.add(name)
        return name


class RequestMeter:
    """What its lease tells of one request. Exactly one `end`; the rest in the order below, each at most once but
    `sent`, `resent` and `progress`. Requests that generate nothing are only counted, by how they ended.
    """

    def __init__(self, meters: RequestMeters, head: Head, model: str, generates: bool) -> None:
        self._meters = meters
        self._metrics = meters.metrics
        self._head = head
        self._model = model
        self._generates = generates
        self._tenant_name: str | None = None
        self._tenant = self._class = _UNKNOWN
        self._replicas: list[str] = []
        self._resends = 0
        self._began_s = meters.clock()
        self._predicted_ttft_s: float | None = None
        self._first_s: float | None = None
        self._last_s = 0.0
        self._first_tokens = 0

    def named(self, head: Head) -> None:
        """Its body brought its id."""
        self._head = head

    def identified(self, tenant: Tenant) -> None:
        """Whose it is."""
        self._tenant_name = tenant.name
        self._tenant = self._meters.tenant_label(tenant.name)

    def waits(self, priority: Priority) -> None:
        """It asks for admission."""
        self._class = priority.label
        if self._generates:
            self._metrics.waiting.labels(self._class).inc()

    def admitted(self, grant: Grant) -> None:
        """It has leave to run."""
        if not self._generates:
            return
        self._metrics.waiting.labels(self._class).dec()
        self._metrics.running.labels(self._class).inc()
        self._metrics.queue.labels(self._class).observe(self._meters.clock() - self._began_s)
        self._predicted_ttft_s = grant.predicted_ttft_s
        if grant.would_refuse is not None:
            self._metrics.would_refuse.labels(grant.would_refuse, self._class).inc()

    def sent(self, replica_id: str) -> None:
        """An attention replica gets it."""
        self._replicas.append(replica_id)

    def resent(self, continued: bool) -> None:
        """It goes on at another attention replica."""
        self._resends += 1
        self._metrics.resends.labels("continued" if continued else "again").inc()

    def progress(self, generated_tokens: int) -> None:
        """A chunk of its stream came; so many tokens so far, at least one."""
        now_s = self._meters.clock()
        if self._first_s is None:
            self._first_s, self._first_tokens = now_s, generated_tokens
            ttft_s = now_s - self._began_s
            self._metrics.ttft.labels(self._class).observe(ttft_s)
            self._judge("ttft", ttft_s)
            if self._predicted_ttft_s is not None:
                self._metrics.prediction_error.labels(self._class).observe(self._predicted_ttft_s - ttft_s)
        else:
            self._metrics.inter_token.labels(self._class).observe(now_s - self._last_s)
        self._last_s = now_s

    def end(
        self, state: State, error: BaseException | None, status: int, prompt_tokens: int | None, generated_tokens: int
    ) -> None:
        """It is over: in which state, by an error or well, with the replica's status (0: it never answered).
        `prompt_tokens` None: not known, as of an answer that ended early.
        """
        outcome, metrics = outcome_of(error, status), self._metrics
        self._log(outcome, error, status, prompt_tokens, generated_tokens)
        if not self._generates:
            metrics.other_requests.labels(self._head.path, outcome).inc()
            return
        metrics.requests.labels(outcome, self._class, self._tenant).inc()
        if isinstance(error, Refusal):
            metrics.refusals.labels(error.reason, error.plane, self._class).inc()
        if state is State.WAITING:
            metrics.waiting.labels(self._class).dec()
        if state is not State.RUNNING:
            return
        metrics.running.labels(self._class).dec()
        metrics.duration.labels(self._class).observe(self._meters.clock() - self._began_s)
        metrics.prompt_tokens.labels(self._class, self._tenant).inc(prompt_tokens or 0)
        metrics.generated_tokens.labels(self._class, self._tenant).inc(generated_tokens)
        further = generated_tokens - self._first_tokens
        if self._first_s is not None and further > 0:
            tpot_s = (self._last_s - self._first_s) / further
            metrics.tpot.labels(self._class).observe(tpot_s)
            self._judge("tpot", tpot_s)

    def _log(
        self, outcome: str, error: BaseException | None, status: int, prompt_tokens: int | None, generated_tokens: int
    ) -> None:
        if status == 0 and isinstance(error, DeepsplitError):
            status = error.http_status
        fields = {
            "request_id": self._head.request_id,
            "tenant": self._tenant_name,
            "class": None if self._class == _UNKNOWN else self._class,
            "path": self._head.path,
            "model": self._model,
            "outcome": outcome,
            "status": status or None,
            "reason": error.reason if isinstance(error, Refusal) else None,
            "plane": error.plane if isinstance(error, Refusal) else None,
            "prompt_tokens": prompt_tokens,
            "generated_tokens": generated_tokens,
            "ttft_s": None if self._first_s is None else self._first_s - self._began_s,
            "duration_s": self._meters.clock() - self._began_s,
            "replicas": tuple(self._replicas),
            "resends": self._resends,
        }
        logger.info("request ended", extra={"fields": fields})

    def _judge(self, objective: str, seconds: float) -> None:
        promised = self._meters.objectives.objective(self._class)
        met = seconds <= (promised.ttft_s if objective == "ttft" else promised.tpot_s)
        self._metrics.slo_requests.labels(self._class, objective, str(met).lower()).inc()
