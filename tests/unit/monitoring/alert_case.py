"""What a test of an alert is: input series in promtool's notation, one sample a minute, and what is expected.

Notation: `5x3` is 5 four times, `0+2x3` is 0 2 4 6, `_` a missing sample.
https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Firing:
    """One alert: labels besides the name, and the rendered description."""

    labels: Mapping[str, str]
    description: str


@dataclass(frozen=True)
class Case:
    """Of all rules of this name, exactly `firing` fire."""

    alert: str
    why: str
    series: Mapping[str, str]
    at_min: int
    firing: tuple[Firing, ...] = ()
    every: str = "30s"  # the rules' own interval; longer, for long stories, where no rule counts samples


def ended(outcome: str) -> str:
    """The series of one tenant's requests that ended so."""
    return f'deepsplit_requests_total{{model="m",class="interactive",tenant="t",outcome="{outcome}"}}'
