"""Prometheus HTTP service discovery: the scrape targets, in Prometheus' own JSON.

https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["gateway", "admission", "directory", "attention", "engine", "experts", "ray"]


@dataclass(frozen=True)
class ScrapeTarget:
    """One process that Prometheus is to scrape."""

    role: Role
    address: str  # host:port
    node: str  # address of its node
    worker: str = ""  # id of the gateway, attention replica or expert worker that it is or belongs to


def discovery_document(targets: Iterable[ScrapeTarget], model: str) -> bytes:
    """Return the answer to Prometheus: one group per target, because labels belong to groups."""
    groups = [
        {
            "targets": [target.address],
            "labels": {"role": target.role, "node": target.node, "worker": target.worker, "model": model},
        }
        for target in targets
    ]
    return json.dumps(groups).encode()
