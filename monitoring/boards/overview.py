"""What is slow, which plane limits, which host is sick: the page to look at first."""

from __future__ import annotations

from monitoring.alerts.slos import REMAINING, SLOS, ratio
from monitoring.boards.board import (
    HERE,
    MODEL,
    RATE,
    TENANT,
    Board,
    Chart,
    Limits,
    Query,
    Row,
    mean,
    quantiles,
    rate,
    top,
    total,
)  # fmt: skip

_FIRING = 'alertname=~"Deepsplit.*",alertstate="firing"'
_EACH = "{{class}} {{slo}}"
_WAITING = total("deepsplit_dispatch_stage_seconds_sum", f'{HERE},stage="wait"')

PROMISES = Row("Are the promises kept?", (
    Chart(
        "Alerts", "short",
        "Alerts that fire now. A page needs somebody at once, a ticket within days; each has a runbook.",
        tuple(
            Query(f'count (ALERTS{{{_FIRING},severity="{severity}"}}) or vector(0)', f"{severity}s")
            for severity in ("page", "ticket")
        ),
        "stat", 4, Limits(1, 2),
    ),
    Chart(
        "SLOs met, last hour", "percentunit",
        "Fraction of requests that kept their class's promise. Below what is promised the budget shrinks: 99 % for "
        "ttft and tpot, 99.9 % without an error of ours.",
        (Query(f"1 - {ratio('1h')}{{{MODEL}}}", _EACH),), "stat", 10, Limits(0.99, 0.95), "DeepsplitTtftBudgetBurn",
    ),
    Chart(
        "Error budget left, 30 days", "percentunit",
        "What may still go wrong this month. Below 0 the promise is broken; stop risky changes well before.",
        (Query(f"{REMAINING}{{{MODEL}}}", _EACH),), "stat", 10, Limits(0.5, 0.1), "DeepsplitErrorBudgetBurn",
    ),
    Chart(
        "Burn rate", "suffix:x",
        "How many times faster than allowed the budget goes, over an hour. 1 just uses it up; 14.4 pages.",
        tuple(
            Query(f'{ratio("1h")}{{{MODEL},slo="{name}"}} / {1 - promised:g}', _EACH)
            for name, promised in SLOS.items()
        ),
        width=12, limits=Limits(1, 14.4), alert="DeepsplitErrorBudgetBurn",
    ),
    Chart(
        "Requests by outcome", "reqps",
        "All generation requests. Anything but ok that grows is worth a look at Gateway.",
        (Query(rate("deepsplit_requests_total", TENANT, "outcome"), "{{outcome}}"),), "stack", 12,
    ),
))  # fmt: skip

CLIENTS = Row("What do clients see?", (
    Chart(
        "Time to first token", "s", "By class. Above the class's promise the SLO is missed.",
        quantiles("deepsplit_ttft_seconds", HERE, "class"), alert="DeepsplitTtftBudgetBurn",
    ),
    Chart(
        "Time per further token", "s", "By class. Above the class's promise the SLO is missed.",
        quantiles("deepsplit_tpot_seconds", HERE, "class"), alert="DeepsplitTpotBudgetBurn",
    ),
    Chart(
        "Tokens", "suffix: tokens/s", "A fall with requests still coming means that something is stuck.",
        (
            Query(total("deepsplit_generated_tokens_total", TENANT), "generated"),
            Query(total("deepsplit_prompt_tokens_total", TENANT), "prompt"),
        ),
    ),
))  # fmt: skip

PLANES = Row("Which plane limits?", (
    Chart(
        "Refusals by plane", "reqps",
        "The plane that limits, as admission sees it. quota is tenants' own; the others mean that capacity is short.",
        (Query(rate("deepsplit_refusals_total", HERE, "plane"), "{{plane}}"),), "stack", alert="DeepsplitShedding",
    ),
    Chart(
        "How full each plane is", "percentunit",
        "The plane nearest to 100 % is the one that limits. Experts busy: time in which they compute. Waiting at "
        "experts: fraction of a dispatch that rows spend in workers' queues.",
        (
            Query(f"sum (deepsplit_engine_running_sequences{{{HERE}}}) / sum (deepsplit_engine_decode_slots{{{HERE}}})",
                  "decode slots"),
            Query(f"avg (deepsplit_kv_cache_usage_ratio{{{HERE}}})", "KV caches"),
            Query(f"max (deepsplit_kv_cache_usage_ratio{{{HERE}}})", "fullest KV cache"),
            Query(f"avg (rate(deepsplit_expert_busy_seconds_total{{{HERE}}}{RATE}))", "experts busy"),
            Query(f"max (rate(deepsplit_expert_busy_seconds_total{{{HERE}}}{RATE}))", "busiest expert worker"),
            Query(f"{_WAITING} / {total('deepsplit_dispatch_seconds_sum', HERE)}", "waiting at experts"),
        ),
        limits=Limits(0.8, 0.95),
    ),
    Chart(
        "Where requests wait", "s",
        "At admission (p99), and per step in expert workers' queues (worst replica). Seconds at admission: too few "
        "slots; a growing queue at the experts: too few workers.",
        (
            *quantiles("deepsplit_queue_seconds", HERE, levels=(0.99,)),
            Query(f"max (deepsplit_engine_experts_queue_seconds{{{HERE}}})", "experts, per step"),
        ),
    ),
    Chart(
        "Waiting requests", "short", "At admission by class. A queue that only grows ends in refusals.",
        (Query(f"sum by (class) (deepsplit_waiting_requests{{{HERE}}})", "{{class}}"),), "stack",
    ),
    Chart(
        "One dispatch", "s",
        "A MoE layer's rows there and back, in the mean. Times the number of layers it is the experts' part of a "
        "decode step; Dispatcher shows what it is made of.",
        (Query(mean("deepsplit_dispatch_seconds", HERE), "mean"), *quantiles("deepsplit_dispatch_seconds", HERE)),
    ),
    Chart(
        "Expert imbalance", "suffix:x",
        "Tokens of a layer's fullest expert over the mean, over layers. Above 4 a few experts hold everybody up.",
        (Query(f"avg (deepsplit_layer_imbalance_ratio{{{HERE}}})", "mean"),
         Query(f"max (deepsplit_layer_imbalance_ratio{{{HERE}}})", "worst layer")),
        limits=Limits(3, 4), alert="DeepsplitExpertImbalance",
    ),
))  # fmt: skip

MEMBERS = Row("Who is there?", (
    Chart(
        "Ready processes", "short",
        "Fewer ready than wanted: capacity is missing, and with experts perhaps redundant ones.",
        (
            Query(f'max by (member) (deepsplit_members{{{MODEL},state="ready"}})', "{{member}} ready"),
            Query(f"max by (member) (deepsplit_members_wanted{{{MODEL}}})", "{{member}} wanted"),
        ),
        "stat", 4, alert="DeepsplitExpertWorkerDown",
    ),
    Chart(
        "Uncovered experts", "short", "Experts that no live worker holds. Above 0 requests wait, fail or are degraded.",
        (Query(f"max (deepsplit_uncovered_experts{{{MODEL}}})", "uncovered"),),
        "stat", 4, Limits(1, 1), "DeepsplitExpertsUncovered",
    ),
    Chart(
        "Live processes", "short", "Scrape targets that answer, by role. A role that is not there serves nothing.",
        (Query(f'sum by (role) (up{{job="deepsplit",{HERE}}})', "{{role}}"),),
        "bars", 4, Limits(1, 0.5), "DeepsplitRoleWithoutTarget",
    ),
    Chart(
        "Targets that do not answer", "short", "By role. Above 0: hanging processes, or a cut network.",
        (Query(f'sum by (role) (up{{job="deepsplit",{HERE}}} == bool 0)', "{{role}}"),),
        "bars", 4, Limits(1, 2), "DeepsplitTargetDown",
    ),
    Chart(
        "Busiest nodes", "percentunit", "CPU, from Ray's node agents. A node at 100 % slows every process on it.",
        (Query(top(f"max by (node) (ray_node_cpu_utilization{{{HERE}}}) / 100", 5), "{{node}}"),),
        "bars", 4, Limits(0.9, 0.98),
    ),
    Chart(
        "Fullest nodes", "percentunit", "Memory in use. Near 100 % the kernel kills processes.",
        (Query(top(f"max by (node) (ray_node_mem_used{{{HERE}}}) / max by (node) (ray_node_mem_total{{{HERE}}})", 5),
               "{{node}}"),),
        "bars", 4, Limits(0.85, 0.95),
    ),
))  # fmt: skip

OVERVIEW = Board(
    "overview", "deepsplit / Overview",
    "Are SLOs met, what do clients see, which plane limits, who is missing. The others go into each plane.",
    (PROMISES, CLIENTS, PLANES, MEMBERS), by_tenant=True,
)  # fmt: skip
