"""Engines: batches, KV caches, drafts, and the processes they run in."""

from __future__ import annotations

from monitoring.boards.board import HERE, MODEL, RATE, Board, Chart, Limits, Query, Row, rate, top, total

_ENGINES = f'{HERE},role=~"attention|engine"'

BATCHES = Row("Batches", (
    Chart(
        "Sequences", "short",
        "Running and waiting in all engines, against the decode slots there are. Waiting above 0 for long: admission "
        "lets more in than fits.",
        (
            Query(f"sum (deepsplit_engine_running_sequences{{{HERE}}})", "running"),
            Query(f"sum (deepsplit_engine_waiting_sequences{{{HERE}}})", "waiting"),
            Query(f"sum (deepsplit_engine_decode_slots{{{HERE}}})", "decode slots"),
        ),
    ),
    Chart(
        "Fullest replicas", "percentunit",
        "Fraction of the decode slots in use. One full and others empty: replica choice is off.",
        (Query(top(f"deepsplit_engine_running_sequences{{{HERE}}} / deepsplit_engine_decode_slots{{{HERE}}}"),
               "{{worker}}"),),
        limits=Limits(0.9, 1),
    ),
    Chart(
        "Longest queues", "short", "Sequences that wait in an engine, the ten longest.",
        (Query(top(f"deepsplit_engine_waiting_sequences{{{HERE}}}"), "{{worker}}"),),
    ),
    Chart(
        "Tokens generated per replica", "suffix: tokens/s",
        "The ten fastest, by vLLM's count. A replica that falls behind with a full batch is slow.",
        (Query(top(rate("vllm:generation_tokens_total", HERE, "worker")), "{{worker}}"),),
    ),
    Chart(
        "Waiting for experts", "s",
        "Per step, in expert workers' queues, summed over layers: the worst replica and the mean.",
        (
            Query(f"max (deepsplit_engine_experts_queue_seconds{{{HERE}}})", "worst"),
            Query(f"avg (deepsplit_engine_experts_queue_seconds{{{HERE}}})", "mean"),
        ),
    ),
    Chart(
        "Drafted tokens accepted", "percentunit",
        "Multi-Token Prediction; only with attention.speculative_tokens. A fall makes decoding slower: other prompts, "
        "or another checkpoint.",
        (Query(f"{total('deepsplit_mtp_accepted_tokens_total', HERE)} / "
               f"{total('deepsplit_mtp_draft_tokens_total', HERE)}", "accepted"),),
        limits=Limits(0.5, 0.2),
    ),
))  # fmt: skip

CACHE = Row("KV cache", (
    Chart(
        "KV cache in use", "percentunit", "Mean and fullest. Above 95 % sequences are preempted or requests refused.",
        (
            Query(f"avg (deepsplit_kv_cache_usage_ratio{{{HERE}}})", "mean"),
            Query(f"max (deepsplit_kv_cache_usage_ratio{{{HERE}}})", "fullest"),
        ),
        limits=Limits(0.8, 0.95), alert="DeepsplitKvCacheExhausted",
    ),
    Chart(
        "Fullest KV caches", "percentunit",
        "The ten fullest replicas. One at 100 % beside empty ones holds the long requests.",
        (Query(top(f"deepsplit_kv_cache_usage_ratio{{{HERE}}}"), "{{worker}}"),), "bars", 8, Limits(0.8, 0.95),
        "DeepsplitKvCacheExhausted",
    ),
    Chart(
        "Preemptions", "suffix:/s", "Sequences thrown out of a full cache, to be computed again. Should be 0.",
        (Query(total("vllm:num_preemptions_total", HERE), "preemptions"),), alert="DeepsplitKvCacheExhausted",
    ),
    Chart(
        "Prefix cache hits", "percentunit",
        "Fraction of prompt tokens found in the cache. A fall means later first tokens.",
        (Query(f"{total('vllm:prefix_cache_hits_total', HERE)} / {total('vllm:prefix_cache_queries_total', HERE)}",
               "hits"),),
    ),
    Chart(
        "Prefill", "suffix: tokens/s", "Prompt tokens computed, all engines, by vLLM's count.",
        (Query(total("vllm:prompt_tokens_total", HERE), "prompt tokens"),),
    ),
    Chart(
        "Replicas", "short", "By state, as the directory sees them, and wanted.",
        (
            Query(f'max by (state) (deepsplit_members{{{MODEL},member="attention"}})', "{{state}}"),
            Query(f'max (deepsplit_members_wanted{{{MODEL},member="attention"}})', "wanted"),
        ),
        "stat", alert="DeepsplitAttentionReplicaDown",
    ),
))  # fmt: skip

PROCESSES = Row("Processes", (
    Chart(
        "CPU", "suffix: cores",
        "The ten busiest processes. On CPU hosts, threads of attention and experts compete for cores.",
        (Query(top(f"max by (role, worker) (rate(process_cpu_seconds_total{{{_ENGINES}}}{RATE}))"),
               "{{role}} {{worker}}"),),
    ),
    Chart(
        "Memory", "bytes", "The ten largest processes. Steady growth is a leak.",
        (Query(top(f"max by (role, worker) (process_resident_memory_bytes{{{_ENGINES}}})"), "{{role}} {{worker}}"),),
    ),
    Chart(
        "Started", "dateTimeFromNow",
        "The five youngest processes. One that is young again and again dies again and again.",
        (Query(top(f"max by (role, worker) (process_start_time_seconds{{{_ENGINES}}}) * 1000", 5),
               "{{role}} {{worker}}"),),
        "stat", alert="DeepsplitAttentionReplicaDown",
    ),
))  # fmt: skip

ATTENTION = Board(
    "attention", "deepsplit / Attention", "Engines of the attention replicas: batches, KV caches, drafts, processes.",
    (BATCHES, CACHE, PROCESSES),
)  # fmt: skip
