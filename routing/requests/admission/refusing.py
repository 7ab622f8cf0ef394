"""Refusals: what they say, and when it is worth coming back."""

from __future__ import annotations

import math
from typing import TypeVar

from cluster.errors import NoCapacity, Overloaded, Plane, Reason, Refusal
from routing.requests.admission.forecast import Forecast
from routing.requests.admission.shared import Shared
from routing.requests.request import Ask
from routing.requests.ticket import Ticket

_RETRY_LEAST_S = 0.5
_RETRY_MOST_S = 60.0
_RETRY_NO_REPLICA_S = 5.0
_JITTER = 0.5  # Retry-After is up to this part longer than computed: those refused together do not come back together
R = TypeVar("R", bound=Refusal)


class Refusals:
    """Makes all refusals of one admission."""

    def __init__(self, shared: Shared, forecast: Forecast) -> None:
        self._shared = shared
        self._forecast = forecast

    def late(
        self,
        ticket: Ticket,
        predicted_s: float,
        excess_s: float,
        plane: Plane,
        now_s: float,
        reason: Reason | None = None,
    ) -> Overloaded:
        """Its first token would come `excess_s` too late. `reason` None: its objective or its deadline."""
        ask = ticket.ask
        label, objective_s = ask.priority.label, self._shared.objectives[ask.priority].ttft_s
        when = f"after about {predicted_s:.1f} s" if math.isfinite(predicted_s) else "too late: higher classes go first"
        by_deadline = ask.deadline_s is not None and ask.deadline_s <= ticket.budget_s and ask.deadline_s != objective_s
        promise = (
            f"the client waits for {ask.deadline_s:g} s only"
            if by_deadline
            else f"{label} requests are promised it within {objective_s:g} s (admission.{label}.ttft_s)"
        )
        reason = reason or (Reason.DEADLINE if by_deadline else Reason.TTFT)
        return self.overloaded(ask, f"the first token would come {when}; {promise}", excess_s, plane, reason, now_s)

    def slow(self, ask: Ask, step_s: float, plane: Plane, now_s: float) -> Overloaded:
        """Its tokens would come too slowly."""
        label, promised_s = ask.priority.label, self._shared.objectives[ask.priority].tpot_s
        message = (
            f"a token takes {step_s:.2g} s now, and {label} requests are promised {promised_s:g} s "
            f"(admission.{label}.tpot_s)"
        )
        return self.overloaded(ask, message, self._forecast.mean_stay_s(), plane, Reason.TPOT, now_s)

    def overloaded(
        self, ask: Ask, message: str, drained_in_s: float, plane: Plane, reason: Reason, now_s: float
    ) -> Overloaded:
        """`drained_in_s`: until it is worth asking again; infinite while higher classes take all."""
        if not math.isfinite(drained_in_s):
            # Until as much has run as waits.
            waiting = sum(queue.slots for queue in self._shared.queues.values())
            slots_per_s = self._forecast.releases(now_s).slots_per_s
            drained_in_s = max(1.0, waiting) / max(1e-3, slots_per_s) + self._forecast.mean_stay_s()
        refusal = Overloaded(
            f"overloaded ({plane}): {message}",
            retry_after_s=min(_RETRY_MOST_S, drained_in_s), plane=plane, reason=reason,
            limits=self._shared.quotas.limits(ask.tenant, now_s),
        )  # fmt: skip
        return self.jittered(refusal)

    def no_capacity(self) -> NoCapacity:
        """No attention replica is there."""
        return self.jittered(
            NoCapacity(
                "no attention replica is ready", retry_after_s=_RETRY_NO_REPLICA_S, plane=Plane.ATTENTION,
                reason=Reason.NO_REPLICA,
            )
        )  # fmt: skip

    def jittered(self, refusal: R) -> R:
        """The refusal with a time to come back that differs between those refused together."""
        if math.isfinite(refusal.retry_after_s):  # infinite: it can never be served as it is
            seconds = max(_RETRY_LEAST_S, refusal.retry_after_s)
            refusal.retry_after_s = seconds * (1 + _JITTER * self._shared.rng.random())
        return refusal
