"""The outcomes that alerts count as our errors are ones that the gateway can report."""

from __future__ import annotations

from cluster import errors
from cluster.errors import DeepsplitError, Refusal
from deployments.gateway.meter import BUG, CANCELLED, CLIENT_ERROR, ENGINE_ERROR, OK
from monitoring.alerts.slos import OURS

ERRORS = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, DeepsplitError)]


def test_each_exists() -> None:
    assert set(OURS) <= {error.outcome for error in ERRORS} | {BUG, ENGINE_ERROR}


def test_none_is_the_clients_doing_or_a_refusal_that_admission_chose() -> None:
    theirs = {error.outcome for error in ERRORS if error.http_status < 500}
    chosen = {error.outcome for error in ERRORS if issubclass(error, Refusal)} - {"no_capacity"}
    assert set(OURS) & (theirs | chosen | {OK, CANCELLED, CLIENT_ERROR}) == set()
