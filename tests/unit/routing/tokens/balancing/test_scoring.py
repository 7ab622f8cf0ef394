"""What a placement costs, and how the rows of its experts are divided."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from routing.tokens.balancing import BalanceOptions, Placement, WorkerCapacity, balance, place, score
from tests.unit.routing.tokens.balancing.cases import (
    EXPERT_BYTES,
    best_time,
    fleet,
    holders,
    situations,
    skewed,
    worker_rows,
)

Situation = tuple[np.ndarray, list[WorkerCapacity], int]
OPTIONS = BalanceOptions(EXPERT_BYTES)


def one_layer(*experts: dict[int, float]) -> Placement:
    """Each expert's weights by worker."""
    most = max(len(of_expert) for of_expert in experts)
    workers_LER, weights_LER = np.full((1, len(experts), most), -1, np.int16), np.zeros((1, len(experts), most), "f4")
    for expert, of_expert in enumerate(experts):
        for at, (worker, weight) in enumerate(of_expert.items()):
            workers_LER[0, expert, at], weights_LER[0, expert, at] = worker, weight
    return Placement(workers_LER, weights_LER)


@settings(max_examples=60, deadline=None)
@given(situations())
def test_rows_are_divided_nearly_as_well_as_can_be(situation: Situation) -> None:
    loads_LE, workers, floor = situation
    loads_LE = loads_LE[:, :8] + 1
    placement = place(loads_LE, workers, BalanceOptions(EXPERT_BYTES, replica_floor=floor))
    speeds = [worker.rows_per_s for worker in workers]
    divided = balance(loads_LE, workers, placement, BalanceOptions(EXPERT_BYTES, budget_bytes=0)).start
    time_L = (worker_rows(divided, loads_LE, len(workers)) / speeds).max(axis=1)
    best_L = [best_time(loads_E, held, speeds) for loads_E, held in zip(loads_LE, holders(divided), strict=True)]
    assert (time_L <= np.array(best_L) * 1.1).all()


def test_rows_pass_through_a_chain_of_workers() -> None:
    """Only by way of all others does the last worker get anything of the first one's rows."""
    experts = [{0: 1.0}, *({at: 1.0, at + 1: 0.0} for at in range(5))]
    loads_LE = np.array([[600.0, 600, 1200, 1200, 1200, 1200]])
    plan = balance(loads_LE, fleet(6, 9, 1), one_layer(*experts), BalanceOptions(EXPERT_BYTES, budget_bytes=0))
    assert plan.before.step_s == 1200
    assert plan.redivided.step_s == pytest.approx(1000, rel=0.02)


def test_a_step_waits_for_the_slowest_worker_of_every_layer() -> None:
    loads_LE = np.array([[60.0, 40]])
    workers = fleet(2, 2, 1, speeds=[1, 2])
    result = score(one_layer({0: 0.5, 1: 0.5}, {1: 1.0}), loads_LE, workers, OPTIONS)
    assert result.step_s == 35  # 70 rows at 2 per second
    assert result.balancedness == pytest.approx(100 / 3 / 35)


def test_after_the_loss_of_a_host_its_rows_go_to_the_others() -> None:
    loads_LE = np.array([[60.0, 40, 20]])
    workers = fleet(3, 3, 1)
    result = score(one_layer({0: 0.5, 1: 0.25, 2: 0.25}, {1: 1.0}, {2: 1.0}), loads_LE, workers, OPTIONS)
    # Without 0: 30 rows to 1 and 2 alike, 70 and 50. Without 1: 40 nowhere, and 15 to 0 and 2 as 2 to 1: 40 and 40.
    # Without 2: 20 nowhere, and 15 as 2 to 1: 40 and 60.
    assert result.step_s == 55
    assert result.loss_s == pytest.approx(max(70, 40 + 40, 60 + 20))
    assert result.seconds == pytest.approx(55 + OPTIONS.loss_weight * 80)


@settings(max_examples=60, deadline=None)
@given(situations())
def test_the_loss_is_that_of_the_worst_host(situation: Situation) -> None:
    loads_LE, workers, floor = situation
    loads_LE = loads_LE + 1
    placement = place(loads_LE, workers, BalanceOptions(EXPERT_BYTES, replica_floor=floor))
    speeds = np.array([worker.rows_per_s for worker in workers])
    hosts = [(worker.zone, worker.host) for worker in workers]
    worst_L = np.zeros(len(loads_LE))
    for lost in set(hosts) if len(set(hosts)) > 1 else ():
        gone = [at for at, host in enumerate(hosts) if host == lost]
        weights_LER = np.where(np.isin(placement.workers_LER, [-1, *gone]), 0, placement.weights_LER + 1e-12)
        sum_LE1 = weights_LER.sum(axis=2, keepdims=True)
        weights_LER = np.divide(weights_LER, sum_LE1, out=np.zeros_like(weights_LER), where=sum_LE1 > 0)
        left = Placement(placement.workers_LER, weights_LER)
        time_L = (worker_rows(left, loads_LE, len(workers)) / speeds).max(axis=1)
        nowhere_L = (loads_LE * (sum_LE1[:, :, 0] == 0)).sum(axis=1)
        worst_L = np.maximum(worst_L, time_L + nowhere_L / speeds.min())
    result = score(placement, loads_LE, workers, OPTIONS)
    assert result.loss_s == pytest.approx(worst_L.sum(), rel=1e-3)


def test_one_host_cannot_be_lost() -> None:
    loads_LE, workers = skewed(2, 16, 0), fleet(4, 5, 2, per_host=4)
    assert score(place(loads_LE, workers, OPTIONS), loads_LE, workers, OPTIONS).loss_s == 0


def test_replicas_in_one_domain_count_once() -> None:
    loads_LE, workers = np.ones((1, 2)), fleet(4, 2, 1, per_host=2)
    floor_2 = BalanceOptions(EXPERT_BYTES, replica_floor=2)
    assert score(one_layer({0: 1, 2: 0}, {1: 1, 3: 0}), loads_LE, workers, floor_2).missing == 0
    assert score(one_layer({0: 1, 1: 0}, {2: 1, 3: 0}), loads_LE, workers, floor_2).missing == 2
