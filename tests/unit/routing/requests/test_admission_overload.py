"""What admission promises under overload, on simulated replicas in virtual time: no clock, no noise of the machine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest

from benchmarks.fakes.service_model import ServiceModel
from benchmarks.overload.mixed import mixed
from benchmarks.overload.report import jain, quantile
from benchmarks.overload.simulation import Call, Simulation
from cluster.config import ClassObjective
from routing.requests.request import Ask, Priority, Tenant

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
FACTORS = (1, 2, 5, 10)


def tokens(call: Call) -> int:
    return sum(WARM_S <= at_s < END_S for at_s in call.token_s)


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


def arrivals(per_s: float, seed: int, classes: tuple[float, float, float]) -> Iterator[Call]:
    rng, now_s, number = random.Random(seed), 0.0, 0
    while True:
        next_s = now_s + rng.expovariate(per_s)
        (tenant,) = rng.choices(list(TENANTS), list(TENANTS.values()))
        (priority,) = rng.choices(list(Priority), classes)
        prompt_tokens, most = rng.randint(80, 320), rng.randint(16, 64)
        length = min(most, 1 + int(rng.expovariate(1 / EOS_EVERY)))
        yield Call(Ask(f"t{number}", tenant, priority, prompt_tokens, most, 1, (), None), now_s, length)
        now_s, number = next_s, number + 1


@cache
def result(factor: float, classes: tuple[float, float, float] = CLASSES) -> Result:
    simulation = Simulation(SERVICE, REPLICAS, OBJECTIVES, seed=7)
    simulation.run(arrivals(factor * CAPACITY_PER_S, 7, classes), END_S)
    calls = list(simulation.calls.values())
    tenants: Counter[str] = Counter()
    for call in calls:
        tenants[call.ask.tenant.name] += tokens(call)
    goodput = sum(tokens(call) for call in calls if call.met(OBJECTIVES)) / (END_S - WARM_S)
    return Result([call for call in calls if call.due_s >= WARM_S], goodput, tenants)


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
    of = result(factor).tenant_tokens
    assert jain([of["loud"], of["quiet"]]) >= 0.95


def test_a_tenant_of_twice_the_weight_gets_more_than_its_equals() -> None:
    of = result(10).tenant_tokens
    assert of["heavy"] > 1.3 * max(of["loud"], of["quiet"])


@pytest.mark.parametrize("factor", FACTORS)
def test_lower_classes_are_refused_first(factor: float) -> None:
    shares = [result(factor).refused_share(priority) for priority in Priority]
    assert shares == sorted(shares)
    assert shares[Priority.SYSTEM] < 0.02


def test_little_is_refused_at_light_load() -> None:
    light = result(0.6)
    assert sum(one.refused_s is not None for one in light.calls) <= 0.01 * len(light.calls)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_tenant_that_asks_for_many_sequences_at_once_keeps_nobody_waiting_and_no_slots_idle(seed: int) -> None:
    found = mixed(seed)
    assert found.narrow_wait_s[0] < 0.1
    assert found.narrow_wait_s[1] < 1.0
    assert found.narrow_refused == 0
    assert found.wide_refused < 0.6  # they are nearly twice what there is room for
    assert found.idle < 0.05
