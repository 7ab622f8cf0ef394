"""Alerts on the expert plane: who holds the experts, and how evenly they are loaded."""

from __future__ import annotations

from monitoring.alerts.rule import Alert, Group, Record

REPLY_SECONDS = "expert_worker:deepsplit_reply_seconds:mean5m"
_WANTED = 'max by (model) (deepsplit_members_wanted{member="experts"})'
_READY = 'max by (model) (deepsplit_members{member="experts",state="ready"})'
_REPLIES = "sum by (model, expert_worker) (rate(deepsplit_dispatch_worker_replies_total[5m]))"
_TIME = "sum by (model, expert_worker) (rate(deepsplit_dispatch_worker_seconds_total[5m]))"


def groups() -> list[Group]:
    """Return the recordings, and then the alerts that read them."""
    others = f"(sum by (model) ({REPLY_SECONDS}) - on (model) group_right () {REPLY_SECONDS})"
    return [
        # Workers without replies are left out: their mean would be 0/0, which makes every sum over it NaN.
        Group("deepsplit-experts", "30s", [Record(REPLY_SECONDS, f"{_TIME} / ({_REPLIES} > 0)")]),
        Group("deepsplit-expert-alerts", "30s", [
            Alert(
                "DeepsplitExpertsUncovered", "max by (model) (deepsplit_uncovered_experts) > 0", "1m", "page",
                "{{ $labels.model }}: some experts have no live holder.",
                "{{ $value }} experts, over all layers, are held by no live worker; requests that need them wait, fail "
                "or are degraded, as dispatch.on_uncovered says.",
                "experts",
            ),
            Alert(
                "DeepsplitExpertWorkerDown", f"{_WANTED} - ({_READY} or 0 * {_WANTED}) > 0", "5m", "ticket",
                "{{ $labels.model }}: fewer expert workers are ready than configured.",
                "{{ $value }} of the expert workers that experts.workers asks for are not ready.",
                "experts",
            ),
            Alert(
                "DeepsplitExpertWorkerFlapping",
                'sum by (model) (increase(deepsplit_expert_worker_events_total{event="lost"}[30m])) > 3',
                "0s", "ticket",
                "{{ $labels.model }}: expert workers are lost again and again.",
                "{{ $value | humanize }} times in 30 minutes an expert worker fell silent.",
                "experts",
            ),
            # A worker that fenced itself is replaced within seconds, one of another checkpoint stays.
            Alert(
                "DeepsplitExpertWorkerSetAside",
                "max by (model, reason) (deepsplit_dispatch_workers_set_aside) > 0", "2m", "ticket",
                "{{ $labels.model }}: engines send nothing to an expert worker that is in the table.",
                "{{ $value }} expert workers are set aside ({{ $labels.reason }}); others have to do without them.",
                "dispatcher",
            ),
            # Against the mean of the others, which unlike the median tells two workers apart.
            Alert(
                "DeepsplitExpertStraggler",
                f"{REPLY_SECONDS} * on (model) group_left () (count by (model) ({REPLY_SECONDS}) - 1) / {others} > 2",
                "10m", "ticket",
                "{{ $labels.model }}: expert worker {{ $labels.expert_worker }} is slower than the others.",
                "It takes {{ $value | humanize }} times as long for a reply as the other workers do in the mean; "
                "every layer waits for the slowest.",
                "dispatcher",
            ),
            # The mean over layers: a step passes through all of them, one skewed layer costs little.
            Alert(
                "DeepsplitExpertImbalance", "avg by (model) (deepsplit_layer_imbalance_ratio) > 4", "30m", "ticket",
                "{{ $labels.model }}: a few experts get most of the tokens.",
                "In the mean over layers the fullest expert has {{ $value | humanize }} times the tokens of the "
                "average one.",
                "experts",
            ),
        ]),
    ]  # fmt: skip
