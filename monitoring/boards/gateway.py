"""Requests as clients see them, and admission."""

from __future__ import annotations

from monitoring.boards.board import (
    HERE,
    RATE,
    TENANT,
    Board,
    Chart,
    Limits,
    Query,
    Row,
    quantiles,
    rate,
    top,
    total,
)  # fmt: skip

_GATEWAYS = f'{HERE},role="gateway"'
_OK = total("deepsplit_requests_total", f'{TENANT},outcome="ok"')


def _promise(slo: str) -> Query:
    promised = f'deepsplit_slo_threshold_seconds{{{HERE},slo="{slo}"}}'
    return Query(f"max by (class) ({promised})", "promised {{class}}")


REQUESTS = Row("Requests", (
    Chart(
        "By class", "reqps", "Load by priority class, however it ended.",
        (Query(rate("deepsplit_requests_total", TENANT, "class"), "{{class}}"),), "stack",
    ),
    Chart(
        "Not ok", "reqps",
        "What ended otherwise, by outcome and class. engine_error, engine_killed, replica_unavailable, stream_lost and"
        " internal_error are ours; quota and bad_request the clients'.",
        (Query(top(rate("deepsplit_requests_total", f'{TENANT},outcome!="ok"', "outcome, class")),
               "{{outcome}} {{class}}"),),
        alert="DeepsplitErrorBudgetBurn",
    ),
    Chart(
        "By tenant", "reqps", "The ten tenants with most requests. One that leaps up explains refusals of the others.",
        (Query(top(rate("deepsplit_requests_total", TENANT, "tenant")), "{{tenant}}"),), "stack",
    ),
    Chart(
        "Tokens by tenant", "suffix: tokens/s", "Prompt plus generated, the ten largest. What quotas count.",
        (Query(
            top(f"{rate('deepsplit_prompt_tokens_total', TENANT, 'tenant')} + "
                f"{rate('deepsplit_generated_tokens_total', TENANT, 'tenant')}"), "{{tenant}}"),),
        "stack",
    ),
    Chart(
        "Tokens per request", "suffix: tokens", "Means. Longer prompts make first tokens later and fill KV caches.",
        (
            Query(f"{total('deepsplit_prompt_tokens_total', TENANT)} / "
                  f"{_OK}", "prompt"),
            Query(f"{total('deepsplit_generated_tokens_total', TENANT)} / "
                  f"{_OK}", "generated"),
        ),
        alert="DeepsplitKvCacheExhausted",
    ),
    Chart(
        "Other requests", "reqps", "Those that generate nothing, by path and outcome.",
        (Query(top(rate("deepsplit_other_requests_total", HERE, "path, outcome")), "{{path}} {{outcome}}"),),
    ),
))  # fmt: skip

LATENCY = Row("Latency", (
    Chart(
        "Time to first token", "s",
        "From arrival, queueing included. Above the promise of its class: the SLO is missed.",
        (*quantiles("deepsplit_ttft_seconds", HERE, "class"), _promise("ttft")), alert="DeepsplitTtftBudgetBurn",
    ),
    Chart(
        "Time per further token", "s", "Mean per request. Above the promise of its class: the SLO is missed.",
        (*quantiles("deepsplit_tpot_seconds", HERE, "class"), _promise("tpot")), alert="DeepsplitTpotBudgetBurn",
    ),
    Chart(
        "Between chunks of a stream", "s", "A p99 far above the p50: steps stall, by long prefills or failovers.",
        quantiles("deepsplit_inter_token_seconds", HERE, "class"),
    ),
    Chart(
        "Whole requests", "s", "End to end. Near gateway.request_timeout_s requests are cut off.",
        quantiles("deepsplit_request_seconds", HERE, "class"),
    ),
    Chart(
        "Waiting for admission", "s", "Of admitted requests. Long waits: engines have no free slots.",
        quantiles("deepsplit_queue_seconds", HERE, "class"), alert="DeepsplitShedding",
    ),
    Chart(
        "Predicted minus actual time to first token", "s",
        "Near 0 is good. Below: admission promises too much; above: it refuses what would have fitted.",
        quantiles("deepsplit_ttft_prediction_error_seconds", HERE, levels=(0.05, 0.5, 0.95)),
        alert="DeepsplitPredictionOff",
    ),
))  # fmt: skip

ADMISSION = Row("Admission", (
    Chart(
        "Waiting", "short", "Requests that wait for a slot, by class. batch waits first, system last.",
        (Query(f"sum by (class) (deepsplit_waiting_requests{{{HERE}}})", "{{class}}"),), "stack",
    ),
    Chart(
        "Running", "short", "Admitted and not ended, by class.",
        (Query(f"sum by (class) (deepsplit_running_requests{{{HERE}}})", "{{class}}"),), "stack",
    ),
    Chart(
        "Refusals", "reqps", "By plane and reason. All but quota mean that capacity is short.",
        (Query(top(rate("deepsplit_refusals_total", HERE, "plane, reason")), "{{plane}} {{reason}}"),),
        "stack", alert="DeepsplitShedding",
    ),
    Chart(
        "Refusals by class", "reqps", "system or interactive being refused is worse than batch.",
        (Query(rate("deepsplit_refusals_total", HERE, "class"), "{{class}}"),), "stack", alert="DeepsplitShedding",
    ),
    Chart(
        "Would be refused", "reqps", "Only with admission.mode shadow: what enforce would have refused.",
        (Query(rate("deepsplit_would_refuse_total", HERE, "class"), "{{class}}"),), "stack",
    ),
    Chart(
        "Sent to another replica", "reqps",
        "Attention replicas were lost under these requests; continued is in mid-stream.",
        (Query(rate("deepsplit_resends_total", HERE, "kind"), "{{kind}}"),), alert="DeepsplitAttentionReplicaDown",
    ),
))  # fmt: skip

PROCESSES = Row("Gateways", (
    Chart(
        "Busiest gateways", "percentunit",
        "Of one core: a gateway's event loop has one. Near 100 %: more gateway.replicas.",
        (Query(top(f"max by (worker) (rate(process_cpu_seconds_total{{{_GATEWAYS}}}{RATE}))"), "{{worker}}"),),
        limits=Limits(0.7, 0.9),
    ),
    Chart(
        "Memory", "bytes", "The ten largest gateways. Steady growth without load is a leak.",
        (Query(top(f"max by (worker) (process_resident_memory_bytes{{{_GATEWAYS}}})"), "{{worker}}"),),
    ),
    Chart(
        "Open files", "percentunit", "Fraction of the process' limit; at 100 % connections are refused.",
        (Query(top(f"max by (worker) (process_open_fds{{{_GATEWAYS}}} / process_max_fds{{{_GATEWAYS}}})"),
               "{{worker}}"),),
        limits=Limits(0.7, 0.9),
    ),
    Chart(
        "Attention replicas in reach", "short",
        "Of the gateway that reaches fewest, and most. They should be the same.",
        (Query(f"min (deepsplit_reachable_attention_replicas{{{HERE}}})", "fewest"),
         Query(f"max (deepsplit_reachable_attention_replicas{{{HERE}}})", "most")),
        alert="DeepsplitAttentionReplicaDown",
    ),
    Chart(
        "Requests per gateway", "reqps", "The ten with most. Very uneven: the balancer in front is at fault.",
        (Query(top(rate("deepsplit_requests_total", TENANT, "worker")), "{{worker}}"),),
    ),
    Chart(
        "Certificates end in", "s", "Only with TLS. Below two days somebody must act at once.",
        (Query(f"min by (role, certificate) (deepsplit_certificate_expiry_timestamp_seconds{{{HERE}}}) - time()",
               "{{role}} {{certificate}}"),),
        "stat", limits=Limits(14 * 86400, 2 * 86400), alert="DeepsplitCertificateExpires",
    ),
))  # fmt: skip

GATEWAY = Board(
    "gateway", "deepsplit / Gateway", "Requests as clients see them, admission and refusals, the gateways' processes.",
    (REQUESTS, LATENCY, ADMISSION, PROCESSES), by_tenant=True,
)  # fmt: skip
