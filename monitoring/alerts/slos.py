"""Service-level objectives (SLOs) and the alerts on how fast their error budgets burn.

Multi-window, multi-burn-rate alerts, with the windows and factors of Google's "The Site Reliability Workbook", chapter
5, table 5-8: https://sre.google/workbook/alerting-on-slos/. A budget is what may go wrong in 30 days; a burn rate of 1
uses it up in just that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from monitoring.alerts.rule import Alert, Group, Record, Severity

# Fraction of events that must be good.
SLOS = {"ttft": 0.99, "tpot": 0.99, "errors": 0.999}

# Outcomes that are our fault. `engine_killed` is one: two engines died, whatever the request was. `request_timeout` is
# one too: a hung engine shows in nothing else; a client that sets itself an impossible deadline is one tenant, which
# the runbook tells apart. `overloaded` and `draining` are not: they were answered at once, with the time to come back,
# and shedding has an alert of its own. `quota`, `bad_request` and their like are the client's, `cancelled` is nobody's.
OURS = ("internal_error", "engine_error", "engine_killed", "replica_unavailable", "stream_lost", "no_capacity",
        "request_timeout")  # fmt: skip

EVENTS, BAD = "model_class:deepsplit_slo_events:rate5m", "model_class:deepsplit_slo_bad:rate5m"
REMAINING = "model_class:deepsplit_error_budget:remaining30d"
WINDOWS = ("5m", "30m", "1h", "6h", "3d")
_LEAST_BAD = 10  # in the long window: one failure on a quiet night is no page
_INTERVAL_S = 30


@dataclass(frozen=True)
class _Burn:
    factor: float
    long: str
    short: str
    severity: Severity
    budget: str  # fraction of the budget that is gone when the alert fires


_BURNS = (
    _Burn(14.4, "1h", "5m", "page", "2 %"),
    _Burn(6, "6h", "30m", "page", "5 %"),
    _Burn(1, "3d", "6h", "ticket", "10 %"),
)

_WHAT = {
    "ttft": ("DeepsplitTtftBudgetBurn", "first tokens come later than promised", "overview"),
    "tpot": ("DeepsplitTpotBudgetBurn", "tokens come more slowly than promised", "overview"),
    "errors": ("DeepsplitErrorBudgetBurn", "requests fail by our fault", "overview"),
}


def ratio(window: str) -> str:
    """Return the name of the recorded fraction of bad events, by model, class and SLO."""
    return f"model_class:deepsplit_slo_bad:ratio_rate{window}"


def groups() -> list[Group]:
    """Return the recordings, and then the alerts that read them."""
    records: list[Record] = []
    for window in WINDOWS:
        records.extend(_records(window))
    for slo, promised in SLOS.items():
        selector = f'{{slo="{slo}"}}'
        spent = f"sum_over_time({BAD}{selector}[30d]) / sum_over_time({EVENTS}{selector}[30d])"
        records.append(Record(REMAINING, f"1 - ({spent}) / {1 - promised:g}", {"slo": slo}))
    alerts = [alert for slo in SLOS for alert in _alerts(slo)]
    interval = f"{_INTERVAL_S}s"
    return [Group("deepsplit-slos", interval, records), Group("deepsplit-burn-rates", interval, alerts)]


def _records(window: str) -> Iterator[Record]:
    """Latencies have their slo as a label already; errors get it. What never went wrong is 0, not missing."""
    by_slo = "sum by (model, class, slo)"
    judged = f"{by_slo} (rate(deepsplit_slo_requests_total[{window}]))"
    missed = f'{by_slo} (rate(deepsplit_slo_requests_total{{met="false"}}[{window}])) or 0 * {judged}'
    ours, by_class = "|".join(OURS), "sum by (model, class)"
    ended = f'{by_class} (rate(deepsplit_requests_total{{outcome=~"ok|{ours}"}}[{window}]))'
    failed = f'{by_class} (rate(deepsplit_requests_total{{outcome=~"{ours}"}}[{window}])) or 0 * {ended}'
    for events, bad, labels in ((judged, missed, {}), (ended, failed, {"slo": "errors"})):
        if window == "5m":
            yield Record(EVENTS, events, labels)
            yield Record(BAD, bad, labels)
        yield Record(ratio(window), f"({bad}) / {events}", labels)


def _alerts(slo: str) -> Iterator[Alert]:
    name, what, board = _WHAT[slo]
    budget = 1 - SLOS[slo]
    selector = f'{{slo="{slo}"}}'
    for burn in _BURNS:
        limit = f"{burn.factor * budget:g}"
        enough = f"sum_over_time({BAD}{selector}[{burn.long}]) * {_INTERVAL_S} >= {_LEAST_BAD}"
        yield Alert(
            name,
            f"{ratio(burn.long)}{selector} > {limit} and {ratio(burn.short)}{selector} > {limit} and {enough}",
            "2m" if burn.severity == "page" else "1h",
            burn.severity,
            f"{{{{ $labels.model }}}}, class {{{{ $labels.class }}}}: {what}.",
            f"True of {{{{ $value | humanizePercentage }}}} in the last {burn.long}; {100 * budget:.2g} % may be. "
            f"At {burn.factor:g} times that, {burn.budget} of the error budget of 30 days goes in {burn.long}.",
            board,
            {"window": burn.long},
        )
