"""Starts waiting requests, in order, where they fit."""

from __future__ import annotations

from routing.requests.admission.decisions import Admitted, Decision
from routing.requests.admission.forecast import Forecast
from routing.requests.admission.shared import Shared
from routing.requests.request import Grant
from routing.requests.ticket import Ticket

_BACKFILLED = 128  # waiting requests of a class that are looked at when some do not fit


class Placing:
    """Gives leave to run."""

    def __init__(self, shared: Shared, forecast: Forecast, send_at_once: bool) -> None:
        """`send_at_once`: to the best replica, whether there is room or not."""
        self._shared = shared
        self._forecast = forecast
        self._send_at_once = send_at_once

    def place_waiting(self, now_s: float) -> list[Decision]:
        """Start what fits, in order. One that does not fit is passed, but a replica is reserved for the first such."""
        decisions: list[Decision] = []
        replicas = self._shared.replicas
        for queue in self._shared.queues.values():
            if not len(queue):
                continue
            for ticket in queue.first(_BACKFILLED):
                replica_id = self._pick(ticket, now_s)
                if replica_id is not None:
                    queue.start(ticket)
                    decisions.append(self.start(ticket, replica_id, now_s))
                elif replicas.open_to(ticket, now_s):
                    if not replicas.any_free():
                        return decisions
                    if replicas.reservation is None:
                        replicas.reserve(ticket, now_s)
                # else it waits for a replica that it was not lost by, and must not hold up the others
        return decisions

    def _pick(self, ticket: Ticket, now_s: float) -> str | None:
        if self._send_at_once or not ticket.slots:
            return self.anywhere(ticket, now_s)
        return self._shared.replicas.pick(ticket, now_s)

    def anywhere(self, ticket: Ticket, now_s: float) -> str | None:
        """A replica for a ticket that needs no room there; None if none is live."""
        states = self._shared.replicas.open_to(ticket, now_s)
        if ticket.slots or not states:
            return self._shared.replicas.choice.best(ticket.ask, states)
        return self._shared.rng.choice(states).load.replica_id

    def start(self, ticket: Ticket, replica_id: str, now_s: float) -> Admitted:
        """Send the ticket to a replica."""
        ask, replicas = ticket.ask, self._shared.replicas
        uncached = 0
        if ticket.slots:
            cached = replicas.choice.cached_tokens(ask, replica_id)
            uncached = ticket.prompt_tokens - min(ticket.prompt_tokens, cached)
        replicas.release(ticket)
        state = replicas.add(ticket, replica_id, uncached, now_s)
        if ticket.slots:
            replicas.choice.placed(ask, state.load)
            self._forecast.placed(ticket)
        limits = self._shared.quotas.limits(ask.tenant, now_s)
        return Admitted(Grant(ask.ticket, replica_id, ticket.predicted_ttft_s, ticket.would_refuse, limits))
