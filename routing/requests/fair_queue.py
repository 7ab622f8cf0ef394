"""Start-time fair queuing (Goyal, Vin, Cheng 1996) between the tenants of one priority class.

A request's tag is the virtual time at which it starts: the end of its tenant's last one or, if that is past, now. The
end is start + cost / weight. Requests run in the order of their tags, and virtual time is the tag of the last one that
was started: a tenant that was idle starts level with the others, with neither credit nor debt.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from routing.requests.prediction.decayed import Rate
from routing.requests.request import Tenant
from routing.requests.ticket import Ticket

_DEMAND_MEMORY_S = 5.0
_MOST_FLOWS = 1024  # tenants that are remembered without a waiting request; see `_forget_idle`
_MOST_OVERTAKERS = 64  # tenants whose later requests are foreseen


@dataclass(eq=False)
class _Flow:
    """One tenant in this class."""

    weight: float
    ends: float = 0.0  # virtual end of its last request
    waiting: int = 0
    last_tag: float = -math.inf  # of its waiting requests: what is paid back to it does not let later ones pass them
    demand: Rate = field(default_factory=lambda: Rate(_DEMAND_MEMORY_S))  # slots asked for per second


class FairQueue:
    """The waiting requests of one class, in their order."""

    def __init__(self) -> None:
        self._order: list[tuple[float, int, Ticket]] = []
        self._flows: dict[str, _Flow] = {}
        self._now = 0.0  # virtual
        self._cost_per_slot = 1.0  # of recent requests
        self.slots = 0
        self.kv_tokens = 0
        self.wide = 0  # requests with more than one slot

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Ticket]:
        """In order. A copy: the queue may change meanwhile."""
        return iter([ticket for _, _, ticket in self._order])

    def moved(self) -> Iterator[Ticket]:
        """Those that ran and wait again; they stand before all others."""
        return takewhile(lambda ticket: ticket.moved, (ticket for _, _, ticket in self._order))

    def last(self) -> Ticket | None:
        """The latest of the most over-served tenant. None if nobody waits but requests that were moved."""
        if not self._order or self._order[-1][2].moved:
            return None
        return self._order[-1][2]

    def note_demand(self, tenant: Tenant, slots: int, now_s: float) -> None:
        """A request came; it counts as demand whether it is refused or not."""
        self._flow(tenant).demand.add(slots, now_s)

    def next_tag(self, tenant: Tenant) -> float:
        """The tag that the tenant's next request will have."""
        flow = self._flows.get(tenant.name)
        return self._now if flow is None else self._next_tag(flow)

    def first(self, count: int) -> list[Ticket]:
        """The first ones, in order."""
        return [ticket for _, _, ticket in self._order[:count]]

    def before(self, tag: float, most_slots: float) -> tuple[int, int]:
        """Slots and KV tokens of the waiting requests that start before a new one with this tag and are not wider."""
        at = bisect_left(self._order, (tag, math.inf))
        if at == len(self._order) and (not self.wide or most_slots == math.inf):
            return self.slots, self.kv_tokens
        slots = kv_tokens = 0
        for _, _, ticket in self._order[:at]:
            if ticket.slots <= most_slots:
                slots, kv_tokens = slots + ticket.slots, kv_tokens + ticket.kv_tokens
        return slots, kv_tokens

    def overtakers(self, tenant: Tenant, tag: float, within_s: float, now_s: float) -> float:
        """Slots of requests that other tenants will probably put before this tag within so many seconds."""
        if len(self._flows) < 2 or within_s <= 0:
            return 0.0
        found = 0.0
        for number, (name, flow) in enumerate(self._flows.items()):
            if name == tenant.name:
                continue
            if number > _MOST_OVERTAKERS:
                break
            room = (tag - self._next_tag(flow)) * flow.weight / self._cost_per_slot
            if room > 0:
                found += min(room, within_s * flow.demand.per_s(now_s))
        return found

    def push(self, ticket: Ticket) -> None:
        """The ticket waits after all that its tenant has waiting; before all others if it needs no slots."""
        flow = self._flow(ticket.ask.tenant)
        if not ticket.slots:
            ticket.tag = -math.inf
        else:
            ticket.tag = flow.last_tag = self._next_tag(flow)
            flow.ends = max(self._now, flow.ends) + ticket.cost / flow.weight
            self._cost_per_slot += 0.02 * (ticket.cost / ticket.slots - self._cost_per_slot)
        self._insert(ticket, flow)

    def push_front(self, ticket: Ticket) -> None:
        """The ticket ran, was charged then, and waits again: before all others, in the order of arrival."""
        ticket.tag, ticket.moved = -math.inf, True
        self._insert(ticket, self._flow(ticket.ask.tenant))

    def start(self, ticket: Ticket) -> None:
        """The ticket has been placed and waits no longer."""
        self._take_out(ticket)
        if not ticket.moved:
            self._now = max(self._now, ticket.tag)

    def remove(self, ticket: Ticket) -> None:
        """The ticket will not run: its tenant's later ones move up."""
        flow = self._take_out(ticket)
        if ticket.moved or not ticket.slots:
            return
        moved_up = ticket.cost / flow.weight
        if flow.waiting:
            name = ticket.ask.tenant.name
            later = [
                one for one in self if one.ask.tenant.name == name and not one.moved and one.number > ticket.number
            ]  # fmt: skip
            for one in later:
                self._take_out(one)
                one.tag = flow.last_tag = max(ticket.tag, one.tag - moved_up)
                self._insert(one, flow)
        flow.ends -= moved_up

    def correct_cost(self, tenant: Tenant, charged: float, cost: float) -> None:
        """A request ended: it cost that much and not what was charged at its start."""
        flow = self._flow(tenant)
        flow.ends += (cost - charged) / flow.weight

    def demand_per_s(self, now_s: float) -> float:
        """Slots that are asked for per second, refused requests included."""
        return sum(flow.demand.per_s(now_s) for flow in self._flows.values())

    def _next_tag(self, flow: _Flow) -> float:
        return max(self._now, flow.ends, flow.last_tag if flow.waiting else -math.inf)

    def _insert(self, ticket: Ticket, flow: _Flow) -> None:
        insort(self._order, (ticket.tag, ticket.number, ticket))
        flow.waiting += 1
        self.slots += ticket.slots
        self.kv_tokens += ticket.kv_tokens
        self.wide += ticket.slots > 1

    def _take_out(self, ticket: Ticket) -> _Flow:
        at = bisect_left(self._order, (ticket.tag, ticket.number))
        assert self._order[at][2] is ticket
        del self._order[at]
        self.slots -= ticket.slots
        self.kv_tokens -= ticket.kv_tokens
        self.wide -= ticket.slots > 1
        flow = self._flow(ticket.ask.tenant)
        flow.waiting -= 1
        return flow

    def _flow(self, tenant: Tenant) -> _Flow:
        flow = self._flows.get(tenant.name)
        if flow is None:
            if len(self._flows) >= _MOST_FLOWS:
                self._forget_idle()
            flow = self._flows[tenant.name] = _Flow(tenant.weight)
        flow.weight = tenant.weight
        return flow

    def _forget_idle(self) -> None:
        """Those level with virtual time lose nothing by it; the others, in the worst case, one request's debt."""
        idle = sorted((flow.ends, name) for name, flow in self._flows.items() if not flow.waiting)
        for _, name in idle[: max(1, len(idle) // 4)]:
            del self._flows[name]
