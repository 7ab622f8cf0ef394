"""Admission that decides in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.config import AdmissionConfig
from routing.requests.admission import Admission, Decision
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, ReplicaLoad, Tenant, Usage


class LocalAdmission:
    """A `Decider` around `Admission`, with a clock.

    `share` below 1: one of several gateways that cannot ask the common admission just now, and takes its part of the
    replicas and of each tenant's quota.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        clock: Callable[[], float],
        decided: Callable[[Decision], None],
        share: float = 1.0,
    ) -> None:
        self._admission = Admission(config, ReplicaChoice(), random.Random())
        self._clock = clock
        self._decided = decided
        self._share = share

    def submit(self, ask: Ask) -> None:
        """See Decider."""
        self._tell(self._admission.submit(self._part(ask), self._clock()))

    def restore(self, ask: Ask, replica_id: str) -> None:
        """See Decider."""
        self._admission.restore(self._part(ask), replica_id, self._clock())

    def cancel(self, ticket: str) -> None:
        """See Decider."""
        self._tell(self._admission.cancel(ticket, self._clock()))

    def first_token(self, ticket: str) -> None:
        """See Decider."""
        self._admission.first_token(ticket, self._clock())

    def progress(self, ticket: str, generated_tokens: int) -> None:
        """See Decider."""
        self._admission.progress(ticket, generated_tokens, self._clock())

    def move(self, ticket: str) -> None:
        """See Decider."""
        self._tell(self._admission.move(ticket, self._clock()))

    def finish(self, ticket: str, usage: Usage) -> None:
        """See Decider."""
        self._tell(self._admission.finish(ticket, usage, self._clock()))

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        """See Decider."""
        parts = loads if self._share == 1 else [_part_of_load(load, self._share) for load in loads]
        self._tell(self._admission.set_loads(parts, self._clock()))

    def tick(self) -> None:
        """To be called every TICK_S."""
        self._tell(self._admission.tick(self._clock()))

    def _tell(self, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            self._decided(decision)

    def _part(self, ask: Ask) -> Ask:
        return ask if self._share == 1 else replace(ask, tenant=_part_of_quota(ask.tenant, self._share))


def _part_of_load(load: ReplicaLoad, share: float) -> ReplicaLoad:
    slots, tokens = max(1, int(load.max_num_seqs * share)), int(load.kv_cache_tokens * share)
    return replace(load, max_num_seqs=slots, kv_cache_tokens=tokens)


def _part_of_quota(tenant: Tenant, share: float) -> Tenant:
    def part(limit: int | None) -> int | None:
        return None if limit is None else max(1, int(limit * share))

    return replace(
        tenant,
        requests_per_minute=part(tenant.requests_per_minute),
        tokens_per_minute=part(tenant.tokens_per_minute),
        max_streams=part(tenant.max_streams),
    )
