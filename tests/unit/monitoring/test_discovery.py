"""HTTP service discovery in Prometheus' own format."""

from __future__ import annotations

import json

from monitoring.discovery import ScrapeTarget, discovery_document


def test_each_target_has_its_labels() -> None:
    targets = [ScrapeTarget("experts", "10.0.0.2:9400", "10.0.0.2", "experts-1"), ScrapeTarget("ray", "[::1]:1", "::1")]
    assert json.loads(discovery_document(targets, "deepseek-v3")) == [
        {
            "targets": ["10.0.0.2:9400"],
            "labels": {"role": "experts", "node": "10.0.0.2", "worker": "experts-1", "model": "deepseek-v3"},
        },
        {"targets": ["[::1]:1"], "labels": {"role": "ray", "node": "::1", "worker": "", "model": "deepseek-v3"}},
    ]


def test_an_empty_cluster_is_an_empty_list() -> None:
    assert json.loads(discovery_document([], "m")) == []
