"""Where the time of a dispatch goes: one MoE layer's rows to the expert workers and back."""

from __future__ import annotations

from monitoring.alerts.experts import REPLY_SECONDS
from monitoring.boards.board import (
    HERE,
    MODEL,
    RATE,
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
)

_STAGE = "deepsplit_dispatch_stage_seconds"
_DISPATCHES = total("deepsplit_dispatch_seconds_count", HERE)

TIME = Row("Where does the time go?", (
    Chart(
        "One dispatch", "s",
        "Retries and the shared expert included. p99 far above p50: stragglers, retries, or prefills.",
        (*quantiles("deepsplit_dispatch_seconds", HERE), Query(mean("deepsplit_dispatch_seconds", HERE), "mean")),
        alert="DeepsplitTpotBudgetBurn",
    ),
    Chart(
        "By stage, mean", "s",
        "What a dispatch is made of. pack, send, combine: this process; wait, compute: the slowest worker; return: "
        "network, gRPC and wake-ups.",
        (Query(f"{rate(_STAGE + '_sum', HERE, 'stage')} / on () group_left () {_DISPATCHES}", "{{stage}}"),), "stack",
        alert="DeepsplitTpotBudgetBurn",
    ),
    Chart(
        "By stage, fraction of time", "percentunit",
        "wait growing: more workers. compute growing: slow hosts or imbalance. return growing: the network.",
        (Query(rate(f"{_STAGE}_sum", HERE, "stage"), "{{stage}}"),), "fractions", alert="DeepsplitTpotBudgetBurn",
    ),
    Chart(
        "Stages, p50", "s", "Half of the dispatches take at most so long in each stage.",
        quantiles(_STAGE, HERE, "stage", (0.5,)),
    ),
    Chart(
        "Stages, p99", "s", "The tail. A stage whose p99 is far above its p50 is the one that varies.",
        quantiles(_STAGE, HERE, "stage", (0.99,)), alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Hidden behind the shared expert", "s",
        "The shared expert is computed while rows are away. Longer than the rest of the dispatch: attention's host "
        "limits, not the experts.",
        (Query(mean("deepsplit_dispatch_shared_expert_seconds", HERE), "shared expert"),
         Query(mean("deepsplit_dispatch_seconds", HERE), "dispatch")),
    ),
))  # fmt: skip

STRAGGLERS = Row("Stragglers", (
    Chart(
        "Who is last", "percentunit",
        "Fraction of the dispatches in which a worker took longest; the ten worst. With n even workers each has 1/n.",
        (Query(
            top(f"{rate('deepsplit_dispatch_last_replies_total', HERE, 'expert_worker')} / on () group_left () "
                f"{total('deepsplit_dispatch_last_replies_total', HERE)}"), "{{expert_worker}}"),),
        alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Time per reply", "s",
        "Queue and compute of each worker, in the mean; the ten slowest. Twice the others': a straggler.",
        (Query(top(f"{REPLY_SECONDS}{{{MODEL}}}"), "{{expert_worker}}"),), alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Replies", "reqps", "Of the ten workers with most. Uneven replies: uneven placement or load.",
        (Query(top(rate("deepsplit_dispatch_worker_replies_total", HERE, "expert_worker")), "{{expert_worker}}"),),
        alert="DeepsplitExpertImbalance",
    ),
))  # fmt: skip

VOLUME = Row("Volume", (
    Chart(
        "Bytes", "Bps", "Frames to workers (out) and back (in). Near what the network carries, return grows.",
        (Query(rate("deepsplit_dispatch_bytes_total", HERE, "direction"), "{{direction}}"),),
    ),
    Chart(
        "Bytes per dispatch", "bytes", "Out and in, in the mean. Grows with the tokens of a step.",
        (Query(f"{rate('deepsplit_dispatch_bytes_total', HERE, 'direction')} / on () group_left () {_DISPATCHES}",
               "{{direction}}"),),
    ),
    Chart(
        "Tokens per dispatch", "suffix: tokens", "p50 and p99; prefills are the large ones.",
        quantiles("deepsplit_dispatch_rows", HERE),
    ),
    Chart(
        "Dispatches", "suffix:/s", "All engines. Falls to 0 with running sequences: engines wait or hang.",
        (Query(_DISPATCHES, "dispatches"),),
    ),
    Chart(
        "Tokens routed", "suffix: tokens/s", "Tokens times experts per token, mean over layers.",
        (Query(f"avg ({rate('deepsplit_layer_routed_tokens_total', HERE, 'layer')})", "routed"),),
    ),
    Chart(
        "Placement epoch", "none",
        "The directory's, and the oldest in use. A gap that stays: engines do not hear of new tables.",
        (
            Query(f"max (deepsplit_placement_epoch{{{MODEL}}})", "published"),
            Query(f"min (deepsplit_dispatch_placement_epoch{{{HERE}}})", "oldest in use"),
        ),
        alert="DeepsplitDirectoryDown",
    ),
))  # fmt: skip

FAILURES = Row("Failures", (
    Chart(
        "Retries", "suffix:/s",
        "Parts of dispatches split again, by why. worker_lost: workers die; worker_silent: workers hang; worker_late: "
        "they take longer than usual; worker_busy: their queues are full; worker_failing: their kernels fail; "
        "stale_placement: tables change; worker_unusable, bad_frame: another checkpoint or version.",
        (Query(rate("deepsplit_dispatch_retries_total", HERE, "reason"), "{{reason}}"),),
        alert="DeepsplitExpertWorkerFlapping",
    ),
    Chart(
        "Failovers", "suffix:/s", "Dispatches that lost a worker and ended well. Each cost a step some time.",
        (Query(total("deepsplit_dispatch_failovers_total", HERE), "failovers"),), alert="DeepsplitExpertWorkerFlapping",
    ),
    Chart(
        "Workers lost", "suffix:/s",
        "Links that broke (worker_lost) or workers that did not answer (worker_silent), also while no rows were away.",
        (Query(rate("deepsplit_dispatch_workers_lost_total", HERE, "reason"), "{{reason}}"),),
        alert="DeepsplitExpertWorkerFlapping",
    ),
    Chart(
        "Workers set aside", "none",
        "In the table, but an engine sends nothing there: another checkpoint or version (worker_unusable), or out of "
        "service by their own word (worker_failing). Must be 0.",
        (Query(f"max by (reason) (deepsplit_dispatch_workers_set_aside{{{HERE}}})", "{{reason}}"),),
        limits=Limits(1, 2), alert="DeepsplitExpertWorkerSetAside",
    ),
    Chart(
        "Waiting for busy workers", "percentunit",
        "Fraction of time that engines wait because the only holders of some experts have full queues.",
        (Query(f"max (rate(deepsplit_dispatch_backoff_seconds_total{{{HERE}}}{RATE}))", "worst engine"),),
        limits=Limits(0.01, 0.1), alert="DeepsplitShedding",
    ),
    Chart(
        "Failed dispatches", "suffix:/s", "By why. Each ends the engine's step with an error; must be 0.",
        (Query(rate("deepsplit_dispatch_failures_total", HERE, "reason"), "{{reason}}"),), limits=Limits(0.001, 0.01),
        alert="DeepsplitErrorBudgetBurn",
    ),
    Chart(
        "Waiting for a holder", "percentunit",
        "Fraction of time that engines wait because nobody holds an expert. Must be 0.",
        (Query(f"max (rate(deepsplit_dispatch_uncovered_wait_seconds_total{{{HERE}}}{RATE}))", "worst engine"),),
        limits=Limits(0.01, 0.1), alert="DeepsplitExpertsUncovered",
    ),
    Chart(
        "Degraded rows", "suffix: rows/s",
        "Computed without all of their experts (dispatch.on_uncovered: degrade): answers are worse than the model's. "
        "Must be 0.",
        (Query(total("deepsplit_dispatch_degraded_rows_total", HERE), "degraded"),), limits=Limits(0.001, 1),
        alert="DeepsplitExpertsUncovered",
    ),
))  # fmt: skip

DISPATCHER = Board(
    "dispatcher", "deepsplit / Dispatcher",
    "What one dispatch takes and of what it is made, stragglers, volume, failures.",
    (TIME, STRAGGLERS, VOLUME, FAILURES),
)  # fmt: skip
