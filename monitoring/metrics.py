"""Every metric that deepsplit emits: name, type, unit, labels, help. docs/metrics.md is made from it.

One class per kind of process. Each process has one registry, passed in, and is a scrape target of its own. Names follow
Prometheus: base units, `_total` for counters. Labels are bounded; what else tells targets apart (role, node, worker,
model) is added by service discovery.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from monitoring.bulk_histogram import BulkHistogram

FAST_SECONDS = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
TOKEN_SECONDS = (1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0,
                   300.0, 600.0)  # fmt: skip
ERROR_SECONDS = (-30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

MAX_TENANTS = 200  # further ones are counted together
OTHER_TENANTS = "other"


class ProcessMetrics:
    """Metrics of every process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.info = Info("deepsplit_process", "Version of this process.", registry=registry)
        self.certificate_expiry = Gauge(
            "deepsplit_certificate_expiry_timestamp_seconds",
            "When a certificate that this process shows ends, in Unix time.",
            ["certificate"],
            registry=registry,
        )


class GatewayMetrics:
    """Metrics of a gateway replica: what clients see."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_class, by_tenant = ["class"], ["class", "tenant"]
        self.requests = Counter(
            "deepsplit_requests", "Generation requests that ended, by how they ended.", ["outcome", *by_tenant],
            registry=registry,
        )  # fmt: skip
        self.other_requests = Counter(
            "deepsplit_other_requests", "Requests that generate nothing (tokenize, models), by how they ended.",
            ["path", "outcome"], registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "deepsplit_prompt_tokens", "Prompt tokens of requests that ended.", by_tenant, registry=registry
        )
        self.generated_tokens = Counter(
            "deepsplit_generated_tokens", "Tokens generated for clients.", by_tenant, registry=registry
        )
        self.ttft = Histogram(
            "deepsplit_ttft_seconds", "Time to first token, from a request's arrival.", by_class,
            buckets=REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self.tpot = Histogram(
            "deepsplit_tpot_seconds", "Mean time per further token of one request.", by_class, buckets=TOKEN_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.inter_token = Histogram(
            "deepsplit_inter_token_seconds", "Time between two chunks of one stream.", by_class, buckets=TOKEN_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "deepsplit_request_seconds", "A request's whole life at the gateway, refused ones left out.", by_class,
            buckets=REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self.queue = Histogram(
            "deepsplit_queue_seconds", "Time that an admitted request waited for admission.", by_class,
            buckets=REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self.prediction_error = Histogram(
            "deepsplit_ttft_prediction_error_seconds", "Predicted minus actual time to first token.", by_class,
            buckets=ERROR_SECONDS, registry=registry,
        )  # fmt: skip
        self.slo_requests = Counter(
            "deepsplit_slo_requests",
            "Requests that had a first token (ttft) or several (tpot), by whether their class's SLO was met.",
            ["class", "slo", "met"], registry=registry,
        )  # fmt: skip
        self.slo_threshold = Gauge(
            "deepsplit_slo_threshold_seconds", "What a priority class is promised (admission.CLASS.ttft_s, tpot_s).",
            ["class", "slo"], registry=registry,
        )  # fmt: skip
        self.refusals = Counter(
            "deepsplit_refusals", "Requests refused, by the plane that limits and the reason.",
            ["reason", "plane", "class"], registry=registry,
        )  # fmt: skip
        self.would_refuse = Counter(
            "deepsplit_would_refuse", "Requests that admission.mode shadow let pass.", ["reason", "class"],
            registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("deepsplit_waiting_requests", "Requests waiting for admission.", by_class,
                             registry=registry)  # fmt: skip
        self.running = Gauge("deepsplit_running_requests", "Requests admitted and not ended.", by_class,
                             registry=registry)  # fmt: skip
        self.resends = Counter(
            "deepsplit_resends", "Requests sent to another attention replica after theirs was lost: before their first "
            "byte (again) or in mid-stream (continued).", ["kind"], registry=registry,
        )  # fmt: skip
        self.replicas = Gauge(
            "deepsplit_reachable_attention_replicas", "Attention replicas that this gateway can send requests to.",
            registry=registry,
        )  # fmt: skip


class DirectoryMetrics:
    """Metrics of the directory: which processes there are."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.epoch = Gauge("deepsplit_placement_epoch", "Epoch of the published placement table.", registry=registry)
        self.uncovered = Gauge(
            "deepsplit_uncovered_experts", "Experts, over all layers, that no live worker holds.", registry=registry
        )
        self.members = Gauge(
            "deepsplit_members", "Processes that the directory knows, by kind and state.", ["member", "state"],
            registry=registry,
        )  # fmt: skip
        self.members_wanted = Gauge(
            "deepsplit_members_wanted", "Processes that the configuration asks for.", ["member"], registry=registry
        )
        self.worker_events = Counter(
            "deepsplit_expert_worker_events", "Expert workers that joined, became ready, left in good order, or were "
            "lost (ended or fell silent).", ["event"], registry=registry,
        )  # fmt: skip
        self.balancedness = Gauge(
            "deepsplit_experts_balancedness_ratio", "Mean over layers of the mean time of a worker over that of the "
            "slowest, by the experts' load of lately and where they are; 1 is perfect.", registry=registry,
        )  # fmt: skip
        self.predicted_gain = Gauge(
            "deepsplit_experts_rebalance_predicted_gain_ratio", "Part of a step's expert time that the last moves were "
            "to save.", registry=registry,
        )  # fmt: skip
        self.measured_gain = Gauge(
            "deepsplit_experts_rebalance_measured_gain_ratio", "Part of a step's expert time that they save, by the "
            "load that came after them.", registry=registry,
        )  # fmt: skip
        self.rebalances = Counter(
            "deepsplit_experts_rebalances", "Rounds of moves that the load was worth.", registry=registry
        )
        self.moves = Counter("deepsplit_experts_moved", "Copies of experts that those rounds loaded.",
                             registry=registry)  # fmt: skip
        self.moved_bytes = Counter("deepsplit_experts_moved_bytes", "Bytes that they loaded.", registry=registry)


class EngineMetrics:
    """Metrics of an attention replica's Serve process, which exposes vLLM's own metrics too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.kv_cache_usage = Gauge(
            "deepsplit_kv_cache_usage_ratio", "Fraction of the KV cache's blocks in use.", registry=registry
        )
        self.running = Gauge("deepsplit_engine_running_sequences", "Sequences in the engine's batch.",
                             registry=registry)  # fmt: skip
        self.waiting = Gauge("deepsplit_engine_waiting_sequences", "Sequences in the engine's queue.",
                             registry=registry)  # fmt: skip
        self.decode_slots = Gauge(
            "deepsplit_engine_decode_slots", "Most sequences in one step (attention.max_num_seqs).", registry=registry
        )
        self.experts_queue = Gauge(
            "deepsplit_engine_experts_queue_seconds", "Time per step that rows wait in expert workers' queues, summed "
            "over the layers; what admission reads.", registry=registry,
        )  # fmt: skip
        self.mtp_drafted = Counter(
            "deepsplit_mtp_draft_tokens", "Tokens drafted by Multi-Token Prediction.", registry=registry
        )
        self.mtp_accepted = Counter(
            "deepsplit_mtp_accepted_tokens", "Drafted tokens that the model accepted.", registry=registry
        )


SET_ASIDE_REASONS = ("worker_unusable", "worker_failing")


class DispatchMetrics:
    """Metrics of an attention engine's own process: one dispatch is one MoE layer's rows there and back."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seconds = BulkHistogram(
            "deepsplit_dispatch_seconds", "One dispatch, retries and the shared expert included.",
            buckets=FAST_SECONDS, registry=registry,
        )  # fmt: skip
        self.stage = BulkHistogram(
            "deepsplit_dispatch_stage_seconds",
            "Parts of a dispatch. pack: split and encode; send: hand over to gRPC; wait: in the queue of the slowest "
            "worker; compute: its experts; return: the rest of the round trip (network both ways, gRPC, wake-ups), "
            "where it was not hidden by the shared expert; combine: sum.",
            ["stage"], buckets=FAST_SECONDS, registry=registry,
        )  # fmt: skip
        self.shared = BulkHistogram(
            "deepsplit_dispatch_shared_expert_seconds", "The shared expert, computed while rows are away.",
            buckets=FAST_SECONDS, registry=registry,
        )  # fmt: skip
        self.rows = BulkHistogram(
            "deepsplit_dispatch_rows", "Tokens per dispatch.", buckets=ROWS, registry=registry
        )
        self.bytes = Counter(
            "deepsplit_dispatch_bytes", "Bytes of frames to (out) and from (in) expert workers.", ["direction"],
            registry=registry,
        )  # fmt: skip
        self.retries = Counter(
            "deepsplit_dispatch_retries", "Parts of dispatches that were split again, by why.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.failovers = Counter(
            "deepsplit_dispatch_failovers", "Dispatches that lost a worker and ended well.", registry=registry
        )
        self.failures = Counter(
            "deepsplit_dispatch_failures", "Dispatches that failed, by why.", ["reason"], registry=registry
        )
        self.degraded_rows = Counter(
            "deepsplit_dispatch_degraded_rows", "Rows computed without all of their experts (dispatch.on_uncovered: "
            "degrade).", registry=registry,
        )  # fmt: skip
        self.uncovered_wait = Counter(
            "deepsplit_dispatch_uncovered_wait_seconds", "Time that dispatches waited for a holder of their experts.",
            registry=registry,
        )  # fmt: skip
        self.backoff = Counter(
            "deepsplit_dispatch_backoff_seconds", "Time that dispatches waited because the only holders of their "
            "experts were busy or failing.", registry=registry,
        )  # fmt: skip
        self.workers_lost = Counter(
            "deepsplit_dispatch_workers_lost", "Expert workers that this engine lost, noticed by a dispatch or on an "
            "idle link. worker_lost: the link broke; worker_silent: no reply in dispatch.call_timeout_s.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.workers_set_aside = Gauge(
            "deepsplit_dispatch_workers_set_aside", "Expert workers in the placement table that this engine sends "
            "nothing to. worker_unusable: of another model, other weights or another wire version; worker_failing: out "
            "of service by its own word.", ["reason"], registry=registry,
        )  # fmt: skip
        for reason in SET_ASIDE_REASONS:
            self.workers_set_aside.labels(reason).set(0)
        self.epoch = Gauge(
            "deepsplit_dispatch_placement_epoch", "Epoch of the placement table in use.", registry=registry
        )
        self.worker_seconds = Counter(
            "deepsplit_dispatch_worker_seconds", "Time in each worker, queue and compute, by the worker's word.",
            ["expert_worker"], registry=registry,
        )  # fmt: skip
        self.worker_replies = Counter(
            "deepsplit_dispatch_worker_replies", "Replies of each worker.", ["expert_worker"], registry=registry
        )
        self.last_replies = Counter(
            "deepsplit_dispatch_last_replies", "Dispatches in which this worker, of several, took longest.",
            ["expert_worker"], registry=registry,
        )  # fmt: skip


class RoutingFamilies:
    """Metrics of an attention engine's own process, made anew for each scrape: what the router chose (see
    `expert_load`).
    """

    def __init__(self) -> None:
        layer, expert = ["layer"], ["layer", "expert"]
        self.routed = CounterMetricFamily(
            "deepsplit_layer_routed_tokens", "Tokens routed in each layer, times experts per token.", labels=layer
        )
        self.imbalance = GaugeMetricFamily(
            "deepsplit_layer_imbalance_ratio", "Tokens of a layer's fullest expert over its experts' mean, lately.",
            labels=layer,
        )  # fmt: skip
        self.load = GaugeMetricFamily(
            "deepsplit_expert_load_ratio", "An expert's tokens over its layer's mean, lately: of the fullest 8 of each "
            "layer, or of all (monitoring.expert_load: full).", labels=expert,
        )  # fmt: skip
        self.tokens = CounterMetricFamily(
            "deepsplit_expert_tokens", "Tokens routed to each expert (only with monitoring.expert_load: full).",
            labels=expert,
        )  # fmt: skip

    def all(self) -> tuple[CounterMetricFamily | GaugeMetricFamily, ...]:
        """Return every family."""
        return (self.routed, self.imbalance, self.load, self.tokens)


class ExpertMetrics:
    """Metrics of an expert worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "deepsplit_expert_requests", "Requests answered, by outcome.", ["outcome"], registry=registry
        )
        self.queue = BulkHistogram(
            "deepsplit_expert_queue_seconds", "From a request's arrival to the start of its computation.",
            buckets=FAST_SECONDS, registry=registry,
        )  # fmt: skip
        self.compute = BulkHistogram(
            "deepsplit_expert_compute_seconds", "One batch of one layer through the experts.", buckets=FAST_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_rows = BulkHistogram(
            "deepsplit_expert_batch_rows", "Rows per batch.", buckets=ROWS, registry=registry
        )
        self.gemm_rows = BulkHistogram(
            "deepsplit_expert_gemm_rows", "Rows of one expert in one batch.", buckets=ROWS, registry=registry
        )
        self.busy = Counter(
            "deepsplit_expert_busy_seconds", "Time in which experts were computed.", registry=registry
        )
        self.waiting = Gauge(
            "deepsplit_expert_waiting_requests", "Requests in the worker's queue.", registry=registry
        )
        self.streams = Gauge("deepsplit_expert_streams", "Open streams of attention engines.", registry=registry)
        self.weights = Gauge("deepsplit_expert_weights_bytes", "Size of the weights held.", registry=registry)
        self.held = Gauge("deepsplit_experts_held", "Experts held, summed over layers.", registry=registry)
        self.load = Gauge("deepsplit_expert_load_seconds", "Time that loading the weights took.", registry=registry)
        self.loaded = Counter(
            "deepsplit_experts_loaded", "Experts loaded, by source (disk, peers).", ["source"], registry=registry
        )
        for source in ("disk", "peers"):  # from 0 on, or rates miss the first
            self.loaded.labels(source)
