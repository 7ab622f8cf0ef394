"""Admission over replicas of a stated service model, in virtual time: no clock, no noise of the machine."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from benchmarks.fakes.service_model import ServiceModel, SimulatedEngine, SimulatedSequence
from cluster.config import AdmissionConfig, ClassObjective
from routing.requests.admission import Admission, Decision, Refused
from routing.requests.quota import Quotas
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, ReplicaLoad, Usage

_TICK_S, _PROGRESS_S = 0.1, 0.25


@dataclass(eq=False)
class Call:
    """One request and what became of it. All its sequences are as long as the first."""

    ask: Ask
    due_s: float
    tokens: int  # that each of its sequences will have
    jobs: list[SimulatedSequence] = field(default_factory=list)
    placed_s: float | None = None
    token_s: list[float] = field(default_factory=list)  # of its first sequence
    told_s: float = 0.0  # last progress
    refused_s: float | None = None

    def wait_s(self, end_s: float) -> float:
        """Until it was placed or refused, or until the end."""
        ended = [at_s for at_s in (self.placed_s, self.refused_s) if at_s is not None]
        return min(ended, default=end_s) - self.due_s

    def met(self, objectives: Mapping[str, ClassObjective]) -> bool:
        """Whether what came so far kept its objective."""
        objective = objectives[self.ask.priority.label]
        if not self.token_s or self.token_s[0] - self.due_s > objective.ttft_s:
            return False
        further = len(self.token_s) - 1
        return further == 0 or (self.token_s[-1] - self.token_s[0]) / further <= objective.tpot_s


class Simulation:
    """Replicas, arrivals and admission on one virtual clock."""

    def __init__(
        self, service: ServiceModel, replicas: int, objectives: Mapping[str, ClassObjective], seed: int
    ) -> None:
        self._service = service
        config = AdmissionConfig.model_validate(objectives)
        self.admission = Admission(config, ReplicaChoice(), random.Random(seed + 1), Quotas())
        self._engines = {f"r{number}": SimulatedEngine(service) for number in range(replicas)}
        self._busy = dict.fromkeys(self._engines, False)
        self.calls: dict[str, Call] = {}
        self._by_job: dict[SimulatedSequence, Call] = {}
        self._held: dict[str, int] = dict.fromkeys(self._engines, 0)  # slots of requests that each has
        self._events: list[tuple[float, int, str | Call]] = []
        self._order = count()
        self._now_s = 0.0
        # While anyone waits, from `watch_s` on:
        self.watch_s = 0.0
        self.waiting_s = self.idle_slot_s = 0.0

    def run(self, calls: Iterable[Call], end_s: float) -> None:
        """Until `end_s`; `calls` in the order of their times."""
        arrivals = iter(calls)
        loads = [ReplicaLoad(name, self._service.slots, self._service.kv_cache_tokens) for name in self._engines]
        self._take(self.admission.set_loads(loads, 0.0))
        self._at(0.0, "tick")
        self._next(arrivals)
        while self._events and self._events[0][0] < end_s:
            at_s, _, what = heapq.heappop(self._events)
            self._watch(at_s)
            self._now_s = at_s
            if isinstance(what, Call):
                self._next(arrivals)
                self._arrive(what)
            elif what == "tick":
                self._at(self._now_s + _TICK_S, "tick")
                self._take(self.admission.tick(self._now_s))
            else:
                self._step_ended(what)

    def idle_share(self) -> float:
        """The part of all decode slots that no request held while anyone waited."""
        slots_s = self.waiting_s * self._service.slots * len(self._engines)
        return self.idle_slot_s / slots_s if slots_s else 0.0

    def _watch(self, until_s: float) -> None:
        took_s = until_s - max(self._now_s, self.watch_s)
        if took_s > 0 and self.admission.waiting():
            self.waiting_s += took_s
            self.idle_slot_s += took_s * sum(max(0, self._service.slots - held) for held in self._held.values())

    def _at(self, when_s: float, what: str | Call) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what))

    def _next(self, arrivals: Iterator[Call]) -> None:
        call = next(arrivals, None)
        if call is not None:
            self._at(call.due_s, call)

    def _arrive(self, call: Call) -> None:
        ask = call.ask
        call.jobs = [SimulatedSequence((), ask.prompt_tokens, call.tokens) for _ in range(ask.sequences)]
        self.calls[ask.ticket] = call
        self._by_job |= dict.fromkeys(call.jobs, call)
        self._take(self.admission.submit(ask, self._now_s))

    def _take(self, decisions: Sequence[Decision]) -> None:
        for one in decisions:
            if isinstance(one, Refused):
                self.calls[one.ticket].refused_s = self._now_s
                continue
            call, replica_id = self.calls[one.grant.ticket], one.grant.replica_id
            call.placed_s = self._now_s
            self._held[replica_id] += len(call.jobs)
            for job in call.jobs:
                self._engines[replica_id].add(job)
            self._step(replica_id)

    def _step(self, replica_id: str) -> None:
        if self._busy[replica_id]:
            return
        took_s = self._engines[replica_id].begin_step()
        if took_s is not None:
            self._busy[replica_id] = True
            self._at(self._now_s + took_s, replica_id)

    def _step_ended(self, replica_id: str) -> None:
        self._busy[replica_id] = False
        moved = dict.fromkeys(self._by_job[job] for job in self._engines[replica_id].end_step())
        for call in moved:
            ticket, generated = call.ask.ticket, sum(job.generated for job in call.jobs)
            if call.jobs[0].generated > len(call.token_s):
                call.token_s.append(self._now_s)
            if not call.told_s:
                call.told_s = self._now_s
                self.admission.progress(ticket, 0, self._now_s)
            if all(job.generated >= job.new_tokens for job in call.jobs):
                self._held[replica_id] -= len(call.jobs)
                self.admission.progress(ticket, generated, self._now_s)
                self._take(self.admission.finish(ticket, Usage(call.ask.prompt_tokens, generated), self._now_s))
            elif self._now_s - call.told_s >= _PROGRESS_S:
                call.told_s = self._now_s
                self.admission.progress(ticket, generated, self._now_s)
        self._step(replica_id)
