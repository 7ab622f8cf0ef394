"""Gateways and attention replicas killed under load: real gateways over fake replicas, no engine."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.faults.__main__ import Fault, FaultOutcome, strike

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

TIMES, CLIENTS = 8, 12  # the benchmark does it 20 times


def run(fault: Fault) -> FaultOutcome:
    outcome = asyncio.run(strike(fault, TIMES, CLIENTS))
    assert outcome.times == TIMES
    assert outcome.tally.answered > TIMES
    assert outcome.struck >= TIMES, "too little was running when it was killed"
    return outcome


@pytest.mark.parametrize("fault", [Fault.ATTENTION_KILLED_EARLY, Fault.ATTENTION_KILLED, Fault.ATTENTION_HUNG])
def test_no_client_notices_a_lost_attention_replica(fault: Fault) -> None:
    outcome = run(fault)
    assert outcome.tally.failed == {}
    assert outcome.tally.again == {}
    # What the clients had read of their answers says which half of the life of a request was hit.
    fraction = outcome.begun / outcome.in_flight
    assert fraction < 0.1 if fault is Fault.ATTENTION_KILLED_EARLY else fraction > 0.6


def test_a_killed_gateway_costs_the_streams_that_it_held_and_no_other() -> None:
    outcome = run(Fault.GATEWAY_KILLED)
    assert set(outcome.tally.failed) <= {"connection lost in the stream"}
    assert outcome.explained == outcome.tally.failed.total()
    assert outcome.explained <= outcome.struck


def test_a_stopped_gateway_costs_nothing() -> None:
    outcome = run(Fault.GATEWAY_DRAINED)
    assert outcome.tally.failed == {}


def test_a_lost_common_admission_costs_nothing() -> None:
    outcome = run(Fault.ADMISSION_KILLED)
    assert outcome.tally.failed == {}
    assert outcome.tally.again == {}
