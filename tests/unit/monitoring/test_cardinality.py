"""How many series a large cluster makes at most: 58 layers x 256 experts x 64 workers x 50 tenants."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import get_args

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cluster import errors
from deployments.gateway.meter import BUG, CANCELLED, CLIENT_ERROR, ENGINE_ERROR, OK
from monitoring.bulk_histogram import BulkHistogram
from monitoring.expert_load import Detail, ExpertLoad
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import (
    MAX_TENANTS,
    DirectoryMetrics,
    DispatchMetrics,
    EngineMetrics,
    ExpertMetrics,
    GatewayMetrics,
    ProcessMetrics,
)

LAYERS, EXPERTS, WORKERS, TENANTS = range(3, 61), 256, 64, 50
GATEWAYS, ATTENTION = 4, 8
REASONS = 12  # of refusals: ttft, tpot, deadline, queue_full, displaced, no_replica, draining, max_streams, quotas


def leaves(root: type[errors.DeepsplitError]) -> Iterator[str]:
    yield root.outcome
    for child in root.__subclasses__():
        yield from leaves(child)


OUTCOMES = sorted({*leaves(errors.DeepsplitError), OK, CANCELLED, CLIENT_ERROR, ENGINE_ERROR, BUG})
CLASSES = ("system", "interactive", "batch", "unknown")
VALUES = {
    "class": CLASSES, "tenant": tuple(f"t{number}" for number in range(TENANTS)), "outcome": tuple(OUTCOMES),
    "path": ("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/models"),
    "reason": tuple(f"r{number}" for number in range(REASONS)), "plane": get_args(errors.Plane),
    "slo": ("ttft", "tpot"), "met": ("true", "false"), "kind": ("again", "continued"),
    "member": ("experts", "attention", "gateway"), "state": ("starting", "loading", "ready", "draining"),
    "event": ("joined", "ready", "left", "lost"), "stage": ("pack", "send", "wait", "compute", "return", "combine"),
    "direction": ("in", "out"), "source": ("disk", "peers"),
    "expert_worker": tuple(f"w{number}" for number in range(WORKERS)), "certificate": ("internal_tls", "gateway.tls"),
}  # fmt: skip


def series(*kinds: type, extra: CollectorRegistry | None = None) -> int:
    """Of one process whose metrics have had every value of every label."""
    registry = ProcessRegistry()
    for kind in kinds:
        for metric in vars(kind(registry)).values():
            names = metric._labelnames
            for values in product(*(VALUES[name] for name in names)) if names else ():
                if isinstance(metric, BulkHistogram):
                    metric.observe([1.0], *values)
                else:
                    metric.labels(*values)
    registries = [registry] if extra is None else [registry, extra]
    return sum(len(metric.samples) for one in registries for metric in one.collect())


def routing(detail: Detail) -> CollectorRegistry:
    tokens_LE = np.ones((len(LAYERS), EXPERTS), dtype=np.int64)
    registry = CollectorRegistry()
    registry.register(ExpertLoad(lambda: (LAYERS, tokens_LE), detail, lambda: 0.0))
    return registry


@pytest.mark.parametrize(("detail", "most"), [("top", 60_000), ("full", 300_000)])
def test_series_of_a_large_cluster_are_bounded(detail: Detail, most: int) -> None:
    gateway = series(ProcessMetrics, GatewayMetrics)
    engine = series(ProcessMetrics, DispatchMetrics, extra=routing(detail))
    worker = series(ProcessMetrics, ExpertMetrics)
    replica = series(ProcessMetrics, EngineMetrics)
    directory = series(ProcessMetrics, DirectoryMetrics)
    total = GATEWAYS * gateway + ATTENTION * (engine + replica) + WORKERS * worker + directory
    assert 0.5 * most < total < most, (gateway, engine, replica, worker, directory, total)


def test_tenants_have_a_bound_of_their_own() -> None:
    assert TENANTS <= MAX_TENANTS <= 4 * TENANTS
