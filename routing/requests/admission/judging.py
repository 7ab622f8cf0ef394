"""Whether a request would keep its promises: its class's objective and its client's deadline.

A request's own work is no overload. What an idle set of replicas can serve at all is admitted: where a request's own
prefill, or a step with nothing beside it, takes longer than its class is promised, only what others add is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import Plane, Reason, Refusal
from routing.requests.admission.decisions import Wait
from routing.requests.admission.forecast import Forecast
from routing.requests.admission.refusing import Refusals
from routing.requests.admission.shared import Shared
from routing.requests.prediction.margin import Margin
from routing.requests.prediction.releases import Room
from routing.requests.request import Ask, Priority
from routing.requests.ticket import Ticket

_KNOWN_S = 10.0  # after so long without an observation, one request is let through to see how fast the cluster is now
_WAITING_SLACK = 1.1  # a waiting request is refused when its prediction exceeds its budget by this
_MOST_AT_ONCE = 16  # waiting requests of a class that one tick refuses because of a prediction


class Judge:
    """Predicts and compares; learns how much later than predicted first tokens come."""

    def __init__(self, shared: Shared, forecast: Forecast, refusals: Refusals) -> None:
        self._shared = shared
        self._forecast = forecast
        self._refusals = refusals
        self._margins = {priority: Margin() for priority in Priority}
        self._tried_s: dict[Reason, float] = {}  # when a request was last let through although it would be late

    def budget_s(self, ask: Ask, uncached_tokens: int) -> float:
        """Most seconds from its submission to its first token."""
        budget_s = self._shared.objectives[ask.priority].ttft_s
        own_s = self._margins[ask.priority].applied(self._shared.pace.prefill_s(uncached_tokens, 0.0))
        if own_s > budget_s:
            budget_s += own_s
        return budget_s if ask.deadline_s is None else min(budget_s, ask.deadline_s)

    def judge(self, ticket: Ticket, now_s: float) -> tuple[Wait, float | None, Refusal | None]:
        """How long a new ticket would wait, its TTFT, and why it is refused, if it is. No TTFT is predicted while every
        replica is away for a moment: requests then wait as long as they have time.
        """
        if not self._shared.replicas.live or not ticket.slots:
            return self._forecast.wait(ticket, now_s), None, None
        ask = ticket.ask
        step_s, plane = self._forecast.best_step()
        bearable_s = self._shared.pace.bearable_step_s(self._shared.objectives[ask.priority].tpot_s)
        if step_s > bearable_s and not self._try_one(Reason.TPOT, self._shared.pace.steps_seen_s, now_s):
            return Wait(0.0, plane), None, self._refusals.slow(ask, step_s, plane, now_s)
        wait = self._forecast.wait(ticket, now_s)
        predicted_s = wait.seconds + self._forecast.prefill_s(ticket, wait.seconds > 0)
        ttft_s = predicted_s if math.isfinite(predicted_s) else None
        excess_s = self._margins[ask.priority].applied(predicted_s) - ticket.budget_s
        if excess_s <= 0:
            return wait, ttft_s, None
        if wait.seconds == 0 and self._try_one(Reason.TTFT, self._shared.pace.prefill_seen_s, now_s):
            return wait, ttft_s, None
        plane = wait.plane if wait.seconds > 0.5 * predicted_s else plane
        return wait, ttft_s, self._refusals.late(ticket, predicted_s, excess_s, plane, now_s)

    def first_token(self, ticket: Ticket, now_s: float) -> None:
        """A ticket's first token came."""
        if not ticket.moved and ticket.predicted_ttft_s is not None:
            margin = self._margins[ticket.ask.priority]
            margin.observe(ticket.predicted_ttft_s, now_s - ticket.waits_since_s, ticket.budget_s)

    def missed(self, ticket: Ticket) -> None:
        """A waiting ticket is refused."""
        if not ticket.moved and ticket.predicted_ttft_s is not None:
            self._margins[ticket.ask.priority].missed()

    def hopeless(self, now_s: float) -> list[tuple[Ticket, Refusal]]:
        """Waiting tickets that would miss, as things are."""
        found: list[tuple[Ticket, Refusal]] = []
        ahead = _Ahead(0.0, 0.0, 0.0)
        for priority, queue in self._shared.queues.items():
            if len(queue):
                waiting = _Waiting(queue.first(len(queue)), now_s, bool(self._shared.replicas.live))
                for index in np.flatnonzero(waiting.by_time & (waiting.waited_s > waiting.budget_s)).tolist():
                    found.append((waiting.tickets[index], self._refusals.no_capacity()))
                if not waiting.by_time.all():
                    found += self._late_ones(waiting, priority, ahead, now_s)
                ahead = ahead.and_all(waiting)
        return found

    def _late_ones(
        self, waiting: _Waiting, priority: Priority, ahead: _Ahead, now_s: float
    ) -> list[tuple[Ticket, Refusal]]:
        """Those of one class whose prediction exceeds their budget. Each that goes makes room for those behind it."""
        found: list[tuple[Ticket, Refusal]] = []
        room = self._forecast.room(priority, now_s)  # once: there may be hundreds of tickets, 20 times a second
        passed = any(queue.wide for queue in self._shared.queues.values()) and len(self._shared.replicas.live) > 1
        prefills_s = self._forecast.prefills_s(waiting.uncached_tokens)
        too_late = waiting.waited_s + prefills_s > waiting.budget_s
        while len(found) < _MOST_AT_ONCE:
            wait_s, for_kv = self._waits(waiting, waiting.stays & ~too_late, room, ahead, passed)
            predicted_s = waiting.waited_s + wait_s + prefills_s
            late = waiting.stays & ~waiting.marked & (too_late | (predicted_s > _WAITING_SLACK * waiting.budget_s))
            if not late.any():
                break
            index = int(late.argmax())
            waiting.stays[index] = False
            plane = Plane.KV_CACHE if for_kv[index] else self._forecast.best_step()[1]
            ticket, seconds = waiting.tickets[index], float(wait_s[index])
            refusal = self._refusals.late(ticket, float(predicted_s[index]), seconds, plane, now_s, Reason.WAITED)
            found.append((ticket, refusal))
        return found

    def _waits(
        self, waiting: _Waiting, counts: NDArray[np.bool_], room: Room, ahead: _Ahead, passed: bool
    ) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
        """Seconds until each is placed, and whether it waits for KV cache. Narrow ones pass those that need several
        slots on one replica.
        """
        kv_tokens = ahead.kv_tokens + np.cumsum(waiting.kv_tokens * counts)
        wait_s, for_kv = room.until(ahead.slots + np.cumsum(waiting.slots * counts), kv_tokens)
        if passed:
            narrow = waiting.slots <= 1
            beside_s, _ = room.until(ahead.narrow + np.cumsum(counts & narrow), np.zeros_like(kv_tokens))
            beside_s /= self._forecast.part_beside_wide()
            wait_s = np.where(narrow, np.minimum(wait_s, beside_s), wait_s)
        return wait_s, for_kv

    def _try_one(self, reason: Reason, seen_s: float, now_s: float) -> bool:
        """Whether to let a request through although it would be late: a pessimistic picture that refuses all requests
        would never be corrected.
        """
        last_s = max(seen_s, self._tried_s.setdefault(reason, now_s))
        if now_s - last_s < _KNOWN_S:
            return False
        self._tried_s[reason] = now_s
        return True


@dataclass(frozen=True)
class _Ahead:
    """What waits in higher classes."""

    slots: float
    kv_tokens: float
    narrow: float  # requests of one slot

    def and_all(self, waiting: _Waiting) -> _Ahead:
        return _Ahead(
            self.slots + float(waiting.slots @ waiting.stays),
            self.kv_tokens + float(waiting.kv_tokens @ waiting.stays),
            self.narrow + float(((waiting.slots <= 1) & waiting.stays).sum()),
        )


class _Waiting:
    """The waiting tickets of a class, column by column."""

    def __init__(self, tickets: list[Ticket], now_s: float, live: bool) -> None:
        self.tickets = tickets
        table = np.array(
            [
                (one.waits_since_s, one.budget_s, one.slots, one.kv_tokens, one.least_uncached_tokens, one.moved)
                for one in tickets
            ]
        )
        self.marked = np.array([one.would_refuse is not None for one in tickets])  # in shadow mode, once is enough
        self.waited_s, self.budget_s = now_s - table[:, 0], table[:, 1]
        self.slots, self.kv_tokens, self.uncached_tokens = table[:, 2], table[:, 3], table[:, 4]
        # Those that wait for another replica than the one that was lost, or for any: nothing else is predicted.
        self.by_time = (table[:, 5] > 0) | (self.slots == 0) if live else np.ones(len(tickets), dtype=bool)
        self.stays = ~self.by_time  # and not yet found to be hopeless
