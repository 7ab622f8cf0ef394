"""Dashboards as data. `grafana.py` makes Grafana's JSON of them, tests read their queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["lines", "stack", "fractions", "stat", "bars", "heatmap", "matrix"]
NOW = ("stat", "bars", "matrix")  # kinds that show the latest value only

# Selectors of the dashboards' variables. Rules' recordings have no node.
MODEL = 'model=~"$model"'
HERE = f'{MODEL},node=~"$node"'
TENANT = f'{HERE},tenant=~"$tenant"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series, which may contain {{label}}."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Limits:
    """The values from which a panel turns orange and red. If low values are bad, `critical` is the lower one."""

    warning: float
    critical: float

    @property
    def low_is_bad(self) -> bool:
        return self.critical < self.warning


@dataclass(frozen=True)
class Chart:
    """One panel. `bad` says what it shows and what a bad value means; `alert` names the runbook."""

    title: str
    unit: str  # Grafana's unit id
    bad: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8  # of 24
    limits: Limits | None = None
    alert: str = ""  # whose runbook says what to do


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard. `name` is one of monitoring.links.BOARDS."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    by_tenant: bool = False

    def charts(self) -> list[Chart]:
        """Return all panels."""
        return [chart for row in self.rows for chart in row.charts]


def quantiles(metric: str, selector: str, by: str = "", levels: tuple[float, ...] = (0.5, 0.99)) -> tuple[Query, ...]:
    """Return queries for quantiles of a histogram over all targets, by one label or none."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return tuple(
        Query(
            f"histogram_quantile({level:g}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}{RATE})))",
            f"p{level * 100:g}{legend}",
        )
        for level in levels
    )


def rate(metric: str, selector: str, by: str) -> str:
    """Return the rate per second, summed over all targets, by some labels."""
    return f"sum by ({by}) (rate({metric}{{{selector}}}{RATE}))"


def total(metric: str, selector: str) -> str:
    """Return the rate per second, summed over all targets."""
    return f"sum (rate({metric}{{{selector}}}{RATE}))"


def mean(metric: str, selector: str) -> str:
    """Return the mean of a histogram over all targets."""
    return f"{total(f'{metric}_sum', selector)} / {total(f'{metric}_count', selector)}"


def padded(expr: str, label: str, digits: int) -> str:
    """Pad a number in a label with leading zeros: Prometheus and Grafana sort labels as text."""
    for length in range(1, digits):
        zeros, any_of_length = "0" * (digits - length), "." * length
        expr = f'label_replace({expr}, "{label}", "{zeros}$1", "{label}", "({any_of_length})")'
    return expr


def top(expr: str, count: int = 10) -> str:
    """Return the largest series only, which keeps a panel readable with a thousand nodes."""
    return f"topk({count}, {expr})"
