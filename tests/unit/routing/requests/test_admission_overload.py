"""What admission promises under overload, on simulated replicas in virtual time: no clock, no noise of the machine."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import pytest

from benchmarks.fakes.service_model import Engine, Job, ServiceModel
from benchmarks.overload.report import jain, quantile
from cluster.config import AdmissionConfig, ClassObjective
from routing.requests.admission import Admission, Decision, Refused
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant, Usage

SERVICE = ServiceModel(slots=8, kv_cache_tokens=16_384, base_s=0.025, sequence_s=0.00125, prefill_tokens_per_s=4_000)
REPLICAS = 2
CAPACITY_PER_S = 9.0  # requests of this mix, about
OBJECTIVES = {
    "system": ClassObjective(ttft_s=1.0, tpot_s=0.15),
    "interactive": ClassObjective(ttft_s=2.0, tpot_s=0.15),
    "batch": ClassObjective(ttft_s=8.0, tpot_s=0.3),
}
CLASSES = (0.02, 0.58, 0.4)  # shares of all requests; the highest class never asks for all that there is
URGENT = (0.1, 0.5, 0.4)  # at ten times the capacity it does
LOUD, QUIET, HEAVY = Tenant("loud"), Tenant("quiet"), Tenant("heavy", weight=2.0)
TENANTS = {LOUD: 0.5, QUIET: 0.2, HEAVY: 0.3}  # `loud` weighs as much as `quiet` and asks for more
EOS_EVERY = 200
WARM_S, END_S = 20.0, 80.0
TICK_S, PROGRESS_S = 0.1, 0.25
FACTORS = (1, 2, 5, 10)


@dataclass(eq=False)
class Call:
    """One request and what became of it."""

    ask: Ask
    due_s: float
    job: Job
    token_s: list[float] = field(default_factory=list)
    told_s: float = 0.0  # last progress
    refused_s: float | None = None

    def met(self) -> bool:
        objective = OBJECTIVES[self.ask.priority.label]
        if not self.token_s or self.token_s[0] - self.due_s > objective.ttft_s:
            return False
        further = len(self.token_s) - 1
        return further == 0 or (self.token_s[-1] - self.token_s[0]) / further <= objective.tpot_s

    def tokens(self) -> int:
        return sum(WARM_S <= at_s < END_S for at_s in self.token_s)


@dataclass(frozen=True)
class Result:
    """Of one load, from WARM_S on."""

    calls: list[Call]  # that came in that time
    goodput: float  # tokens per second
    tenant_tokens: Counter[str]

    def ttft_s(self, priority: Priority) -> list[float]:
        """Of requests that were let in; one without a first token counts with what it has waited."""
        of_class = [one for one in self.calls if one.ask.priority == priority and one.refused_s is None]
        return [(one.token_s[0] if one.token_s else END_S) - one.due_s for one in of_class]

    def refused_share(self, priority: Priority) -> float:
        of_class = [one for one in self.calls if one.ask.priority == priority]
        return sum(one.refused_s is not None for one in of_class) / len(of_class)


class Simulation:
    """Replicas, arrivals and admission on one virtual clock."""

    def __init__(self, per_s: float, seed: int, classes: tuple[float, float, float] = CLASSES) -> None:
        self._rng = random.Random(seed)
        self._classes = classes
        config = AdmissionConfig.model_validate(OBJECTIVES)
        self.admission = Admission(config, ReplicaChoice(), random.Random(seed + 1))
        self._engines = {f"r{number}": Engine(SERVICE) for number in range(REPLICAS)}
        self._busy = dict.fromkeys(self._engines, False)
        self._per_s = per_s
        self.calls: dict[str, Call] = {}
        self._by_job: dict[Job, Call] = {}
        self._events: list[tuple[float, int, str]] = []
        self._order = count()
        self._now_s = 0.0

    def run(self) -> Result:
        loads = [ReplicaLoad(name, SERVICE.slots, SERVICE.kv_cache_tokens) for name in self._engines]
        self._take(self.admission.set_loads(loads, 0.0))
        self._at(0.0, "arrival")
        self._at(0.0, "tick")
        while self._events and self._events[0][0] < END_S:
            self._now_s, _, what = heapq.heappop(self._events)
            if what == "arrival":
                self._at(self._now_s + self._rng.expovariate(self._per_s), "arrival")
                self._arrive()
            elif what == "tick":
                self._at(self._now_s + TICK_S, "tick")
                self._take(self.admission.tick(self._now_s))
            else:
                self._step_ended(what)
        calls = list(self.calls.values())
        tenants: Counter[str] = Counter()
        for call in calls:
            tenants[call.ask.tenant.name] += call.tokens()
        goodput = sum(call.tokens() for call in calls if call.met()) / (END_S - WARM_S)
        return Result([call for call in calls if call.due_s >= WARM_S], goodput, tenants)

    def _at(self, when_s: float, what: str) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what))

    def _arrive(self) -> None:
        rng, ticket = self._rng, f"t{len(self.calls)}"
        (tenant,) = rng.choices(list(TENANTS), list(TENANTS.values()))
        (priority,) = rng.choices(list(Priority), self._classes)
        prompt_tokens, most = rng.randint(80, 320), rng.randint(16, 64)
        length = min(most, 1 + int(rng.expovariate(1 / EOS_EVERY)))
        ask = Ask(ticket, tenant, priority, prompt_tokens, most, 1, (), None)
        call = Call(ask, self._now_s, Job((), prompt_tokens, length))
        self.calls[ticket] = self._by_job[call.job] = call
        self._take(self.admission.submit(ask, self._now_s))

    def _take(self, decisions: list[Decision]) -> None:
        for one in decisions:
            if isinstance(one, Refused):
                self.calls[one.ticket].refused_s = self._now_s
            else:
                replica_id = one.grant.replica_id
                self._engines[replica_id].add(self.calls[one.grant.ticket].job)
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
        ended: list[Call] = []
        for job in self._engines[replica_id].end_step():
            call = self._by_job[job]
            call.token_s.append(self._now_s)
            ticket = call.ask.ticket
            if job.generated == 1:
                call.told_s = self._now_s
                self.admission.first_token(ticket, self._now_s)
            if job.generated >= job.new_tokens:
                ended.append(call)
            elif self._now_s - call.told_s >= PROGRESS_S:
                call.told_s = self._now_s
                self.admission.progress(ticket, job.generated, self._now_s)
        for call in ended:
            usage = Usage(call.ask.prompt_tokens, call.job.generated)
            self.admission.progress(call.ask.ticket, call.job.generated, self._now_s)
            self._take(self.admission.finish(call.ask.ticket, usage, self._now_s))
        self._step(replica_id)


@cache
def result(factor: float, classes: tuple[float, float, float] = CLASSES) -> Result:
    return Simulation(factor * CAPACITY_PER_S, 7, classes).run()


def test_goodput_at_ten_times_the_capacity_is_what_it_is_at_most() -> None:
    most = max(result(factor).goodput for factor in FACTORS)
    assert result(10).goodput >= 0.95 * most


@pytest.mark.parametrize("factor", FACTORS)
def test_those_let_in_get_their_first_token_in_time(factor: float) -> None:
    for priority in (Priority.SYSTEM, Priority.INTERACTIVE):
        times = result(factor).ttft_s(priority)
        assert times
        assert quantile(times, 0.99) <= OBJECTIVES[priority.label].ttft_s, priority


# Near the capacity, few are refused at all, and what higher classes will leave to a waiting one is least certain.
@pytest.mark.parametrize(
    ("factor", "classes", "share"),
    [(2, CLASSES, 0.98), (5, CLASSES, 0.99), (10, CLASSES, 0.99), (5, URGENT, 0.99), (10, URGENT, 0.99)],
)
def test_nearly_all_refusals_are_decided_at_submission(
    factor: float, classes: tuple[float, float, float], share: float
) -> None:
    refused = [one for one in result(factor, classes).calls if one.refused_s is not None]
    at_once = sum(one.refused_s == one.due_s for one in refused)
    assert len(refused) > 100
    assert at_once >= share * len(refused)


def test_goodput_stays_where_the_highest_class_takes_nearly_all() -> None:
    assert result(10, URGENT).goodput >= 0.95 * result(10).goodput
    assert quantile(result(10, URGENT).ttft_s(Priority.SYSTEM), 0.99) <= OBJECTIVES["system"].ttft_s


@pytest.mark.parametrize("factor", [5, 10])
def test_equal_tenants_get_equal_shares_though_one_asks_for_more(factor: float) -> None:
    tokens = result(factor).tenant_tokens
    assert jain([tokens["loud"], tokens["quiet"]]) >= 0.95


def test_a_tenant_of_twice_the_weight_gets_more_than_its_equals() -> None:
    tokens = result(10).tenant_tokens
    assert tokens["heavy"] > 1.3 * max(tokens["loud"], tokens["quiet"])


@pytest.mark.parametrize("factor", FACTORS)
def test_lower_classes_are_refused_first(factor: float) -> None:
    shares = [result(factor).refused_share(priority) for priority in Priority]
    assert shares == sorted(shares)
    assert shares[Priority.SYSTEM] < 0.02


def test_little_is_refused_at_light_load() -> None:
    light = result(0.6)
    assert sum(one.refused_s is not None for one in light.calls) <= 0.01 * len(light.calls)
