"""Alerts on attention replicas and on admission, which decides by what they report."""

from __future__ import annotations

from monitoring.alerts.rule import Alert, Group, Severity

_WANTED = 'max by (model) (deepsplit_members_wanted{member="attention"})'
_READY = 'max by (model) (deepsplit_members{member="attention",state="ready"})'
_SHED = (
    'sum by (model, plane) (rate(deepsplit_refusals_total{plane!="quota"}[5m]))'
    " / on (model) group_left () sum by (model) (rate(deepsplit_requests_total[5m]))"
)
_ERRORS = "deepsplit_ttft_prediction_error_seconds"
_PREDICTED = f"sum by (model, class) (rate({_ERRORS}_count[30m]))"
_TOO_SHORT = f'sum by (model, class) (rate({_ERRORS}_bucket{{le="-2.0"}}[30m]))'
_NOT_TOO_LONG = f'sum by (model, class) (rate({_ERRORS}_bucket{{le="2.0"}}[30m]))'


def groups() -> list[Group]:
    """Return the alerts, in one group."""
    return [
        Group("deepsplit-attention-alerts", "30s", [
            Alert(
                "DeepsplitAttentionReplicaDown", f"{_WANTED} - ({_READY} or 0 * {_WANTED}) > 0", "5m", "ticket",
                "{{ $labels.model }}: fewer attention replicas are ready than configured.",
                "{{ $value }} of the attention replicas that attention.replicas asks for are not ready.",
                "attention",
            ),
            Alert(
                "DeepsplitKvCacheExhausted", "avg by (model) (deepsplit_kv_cache_usage_ratio) > 0.95", "10m", "ticket",
                "{{ $labels.model }}: the KV caches are full.",
                "{{ $value | humanizePercentage }} of the KV caches' blocks are in use, in the mean over replicas; "
                "vLLM preempts sequences, or admission refuses requests.",
                "attention",
            ),
            _shedding("0.05", "15m", "ticket"),
            _shedding("0.25", "5m", "page"),
            Alert(
                "DeepsplitPredictionOff",
                f"({_TOO_SHORT} + {_PREDICTED} - {_NOT_TOO_LONG}) / ({_PREDICTED} > 0.01) > 0.2", "30m", "ticket",
                "{{ $labels.model }}, class {{ $labels.class }}: admission predicts times to first token badly.",
                "{{ $value | humanizePercentage }} of the predictions were more than 2 s off; what is refused and what "
                "is promised rests on them.",
                "gateway",
            ),
        ]),
    ]  # fmt: skip


def _shedding(fraction: str, wait: str, severity: Severity) -> Alert:
    return Alert(
        "DeepsplitShedding", f"{_SHED} > {fraction}", wait, severity,
        "{{ $labels.model }}: requests are refused; the plane that limits is {{ $labels.plane }}.",
        "{{ $value | humanizePercentage }} of the requests were refused because of this plane.",
        "gateway",
    )  # fmt: skip
