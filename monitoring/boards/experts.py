"""Which experts are hot, and which hosts hold everybody up."""

from __future__ import annotations

from monitoring.boards.board import HERE, MODEL, RATE, Board, Chart, Limits, Query, Row, padded, quantiles, rate, top

_WORKERS = f'{HERE},role="experts"'
_LOAD = f"max by (layer, expert) (deepsplit_expert_load_ratio{{{HERE}}})"
_IMBALANCE = f"max by (layer) (deepsplit_layer_imbalance_ratio{{{HERE}}})"

LOAD = Row("Load of the experts", (
    Chart(
        "Layer by expert", "none",
        "Tokens of each expert over its layer's mean, now: 1 is fair, red is hot. A red column is an expert hot in all "
        "layers, a red row a skewed layer. By default the fullest 8 of each layer, or all (monitoring.expert_load).",
        (Query(top(padded(padded(_LOAD, "layer", 3), "expert", 3), 1000), "{{layer}} {{expert}}"),),
        "matrix", 24, alert="DeepsplitExpertImbalance",
    ),
    Chart(
        "Imbalance by layer", "suffix:x",
        "Fullest expert over the mean, over time. A layer that turns dark holds every step up.",
        (Query(padded(_IMBALANCE, "layer", 3), "{{layer}}"),), "heatmap", 12, alert="DeepsplitExpertImbalance",
    ),
    Chart(
        "Imbalance", "suffix:x",
        "Mean over layers and worst layer. The mean above 4 is worth more replicas of the experts.",
        (Query(f"avg (deepsplit_layer_imbalance_ratio{{{HERE}}})", "mean"),
         Query(f"max ({_IMBALANCE})", "worst layer")),
        width=6, limits=Limits(3, 4), alert="DeepsplitExpertImbalance",
    ),
    Chart(
        "Hottest experts", "suffix:x", "The ten hottest now, over their layer's mean.",
        (Query(top(_LOAD), "layer {{layer}} expert {{expert}}"),), "bars", 6, Limits(3, 6),
        "DeepsplitExpertImbalance",
    ),
))  # fmt: skip

HOSTS = Row("Hosts", (
    Chart(
        "Busy fraction", "percentunit",
        "Time in which a worker computes: mean and the ten busiest. Near 100 % its queue grows; all near 100 %: more "
        "workers.",
        (
            Query(f"avg (rate(deepsplit_expert_busy_seconds_total{{{HERE}}}{RATE}))", "mean"),
            Query(top(f"max by (node, worker) (rate(deepsplit_expert_busy_seconds_total{{{HERE}}}{RATE}))"),
                  "{{node}} {{worker}}"),
        ),
        limits=Limits(0.8, 0.95), alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Time in queue, p99", "s", "The ten worst workers. One far above the others is a straggler.",
        (Query(
            top("histogram_quantile(0.99, "
                f"{rate('deepsplit_expert_queue_seconds_bucket', HERE, 'le, node, worker')})"),
            "{{node}} {{worker}}"),),
        alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Requests in queue", "short", "The ten longest queues. One that only grows: a worker too slow for its share.",
        (Query(top(f"max by (node, worker) (deepsplit_expert_waiting_requests{{{HERE}}})"), "{{node}} {{worker}}"),),
    ),
    Chart(
        "Memory of workers", "bytes",
        "The ten largest, weights included. Growth is a leak: workers keep nothing between calls.",
        (Query(top(f"max by (node, worker) (process_resident_memory_bytes{{{_WORKERS}}})"), "{{node}} {{worker}}"),),
    ),
    Chart(
        "Memory of nodes", "percentunit", "The ten fullest, all processes. Near 100 % the kernel kills processes.",
        (Query(top(f"max by (node) (ray_node_mem_used{{{HERE}}}) / max by (node) (ray_node_mem_total{{{HERE}}})"),
               "{{node}}"),),
        "bars", 8, Limits(0.85, 0.95),
    ),
    Chart(
        "CPU of nodes", "percentunit", "The ten busiest, all processes. At 100 % something competes with the experts.",
        (Query(top(f"max by (node) (ray_node_cpu_utilization{{{HERE}}}) / 100"), "{{node}}"),), "bars", 8,
        Limits(0.9, 0.98),
    ),
))  # fmt: skip

WORK = Row("Work", (
    Chart(
        "Rows of one expert in a batch", "suffix: rows",
        "p50 and p99. Few rows: memory bandwidth limits; many: compute does.",
        quantiles("deepsplit_expert_gemm_rows", HERE),
    ),
    Chart(
        "Rows of a batch", "suffix: rows", "What workers compute at once. Grows with load as long as batching works.",
        quantiles("deepsplit_expert_batch_rows", HERE),
    ),
    Chart(
        "Time of a batch", "s",
        "One layer through the experts. Growing with the same rows: hosts are slower than before.",
        quantiles("deepsplit_expert_compute_seconds", HERE), alert="DeepsplitExpertStraggler",
    ),
    Chart(
        "Answers", "reqps", "By outcome. Anything but ok is sent to another worker; it should be 0.",
        (Query(rate("deepsplit_expert_requests_total", HERE, "outcome"), "{{outcome}}"),), "stack",
    ),
    Chart(
        "Slowest loads", "s", "Time that loading the weights took: how long a failover takes. The ten longest.",
        (Query(top(f"max by (node, worker) (deepsplit_expert_load_seconds{{{HERE}}})"), "{{node}} {{worker}}"),),
        "bars", alert="DeepsplitExpertWorkerDown",
    ),
    Chart(
        "Experts loaded", "suffix:/s", "From disk, and from other workers that hold them: the faster gives more.",
        (Query(rate("deepsplit_experts_loaded_total", HERE, "source"), "{{source}}"),), "stack",
    ),
    Chart(
        "Weights", "bytes", "Held by all workers together, and by the largest.",
        (
            Query(f"sum (deepsplit_expert_weights_bytes{{{HERE}}})", "all"),
            Query(f"max (deepsplit_expert_weights_bytes{{{HERE}}})", "largest"),
        ),
        "stat",
    ),
))  # fmt: skip

HOLDERS = Row("Who holds them?", (
    Chart(
        "Workers", "short", "By state, as the directory sees them, and wanted.",
        (
            Query(f'max by (state) (deepsplit_members{{{MODEL},member="experts"}})', "{{state}}"),
            Query(f'max (deepsplit_members_wanted{{{MODEL},member="experts"}})', "wanted"),
        ),
        "stat", 6, alert="DeepsplitExpertWorkerDown",
    ),
    Chart(
        "Uncovered experts", "short", "That no live worker holds. Above 0 requests wait, fail or are degraded.",
        (Query(f"max (deepsplit_uncovered_experts{{{MODEL}}})", "uncovered"),), "stat", 6, Limits(1, 1),
        "DeepsplitExpertsUncovered",
    ),
    Chart(
        "Workers that come and go", "suffix:/h", "By event. lost again and again: a host or its network is sick.",
        (Query(f"sum by (event) (increase(deepsplit_expert_worker_events_total{{{MODEL}}}[1h]))", "{{event}}"),),
        width=6, alert="DeepsplitExpertWorkerFlapping",
    ),
    Chart(
        "Experts held, streams", "short",
        "Experts held over all layers and workers, and open streams of engines. Streams: one per engine and worker.",
        (
            Query(f"sum (deepsplit_experts_held{{{HERE}}})", "held"),
            Query(f"sum (deepsplit_expert_streams{{{HERE}}})", "streams"),
        ),
        "stat", 6,
    ),
))  # fmt: skip

EXPERTS = Board(
    "experts", "deepsplit / Experts",
    "Load by layer and expert, imbalance, the hosts that hold the experts and their work.",
    (LOAD, HOSTS, WORK, HOLDERS),
)  # fmt: skip
