"""Admission that decides in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import assert_never

from cluster.config import AdmissionConfig
from deployments.admission.messages import Cancel, Event, Finish, Move, Progress, Restore, Submit
from routing.requests.admission import Admission, Decision, Demand
from routing.requests.quota import Quotas
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import ReplicaLoad


class LocalAdmission:
    """A `Decider` around `Admission`, with a clock.

    `fraction` below 1: one of several gateways that cannot ask the common admission just now, and takes this part of
    the replicas and of each tenant's quota.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        clock: Callable[[], float],
        decided: Callable[[Decision], None],
        quotas: Quotas,
        fraction: float = 1.0,
    ) -> None:
        """The accounts of `quotas` may outlive this admission."""
        quotas.set_fraction(fraction)
        self._admission = Admission(config, ReplicaChoice(), random.Random(), quotas)
        self._clock = clock
        self._decided = decided
        self._fraction = fraction
        self._parts: dict[str, tuple[ReplicaLoad, ReplicaLoad]] = {}  # by replica: its load, and our part of it

    def tell(self, event: Event) -> None:
        """Something happened to a request. The quotas know of a restored one already."""
        admission, now_s = self._admission, self._clock()
        match event:
            case Submit(ask):
                self._report(admission.submit(ask, now_s))
            case Restore(ask, replica_id, generated_tokens):
                admission.restore(ask, replica_id, generated_tokens, now_s)
            case Cancel(ticket):
                self._report(admission.cancel(ticket, now_s))
            case Progress(ticket, generated_tokens):
                admission.progress(ticket, generated_tokens, now_s)
            case Move(ticket):
                self._report(admission.move(ticket, now_s))
            case Finish(ticket, usage):
                self._report(admission.finish(ticket, usage, now_s))
            case _:
                assert_never(event)

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """The live replicas have these newest loads."""
        self._report(self._admission.set_loads([self._part(load) for load in loads], self._clock()))

    def tick(self) -> None:
        """To be called every TICK_S."""
        self._report(self._admission.tick(self._clock()))

    def demand(self) -> Demand:
        """What clients ask of this admission now, in whole replicas."""
        demand = self._admission.demand(self._clock())
        return replace(demand, per_replica=demand.per_replica / self._fraction)

    def _report(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            self._decided(decision)

    def _part(self, load: ReplicaLoad) -> ReplicaLoad:
        """The same object as last time for a load that is the same."""
        if self._fraction == 1:
            return load
        known = self._parts.get(load.replica_id)
        if known is None or known[0] is not load:
            decode_slots = max(1, int(load.max_num_seqs * self._fraction))
            tokens = int(load.kv_cache_tokens * self._fraction)
            part = replace(load, max_num_seqs=decode_slots, kv_cache_tokens=tokens)
            known = self._parts[load.replica_id] = load, part
        return known[1]
