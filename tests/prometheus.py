"""A real Prometheus as tests ask it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

Series = tuple[Mapping[str, str], float]


class PrometheusApi:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, timeout=30)

    def query(self, expr: str) -> list[Series]:
        """(labels, value) of each series now."""
        data = self._get("/api/v1/query", query=expr)
        assert data["resultType"] == "vector", expr
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def has_data(self, expr: str) -> bool:
        """Whether some series has a value that is a number."""
        return any(not math.isnan(value) for _, value in self.query(expr))

    def by(self, expr: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values by some of their labels."""
        return {tuple(found[label] for label in labels): value for found, value in self.query(expr)}

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self._get("/api/v1/alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def targets(self) -> dict[str, tuple[str, str]]:
        """instance -> (role, health)."""
        active = self._get("/api/v1/targets", state="active")["activeTargets"]
        return {target["labels"]["instance"]: (target["labels"]["role"], target["health"]) for target in active}

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]


def hurried(rules: Path, folder: Path) -> Path:
    """A copy of a rule file that is evaluated every second and whose alerts wait for two."""
    document = yaml.safe_load(rules.read_text())
    for group in document["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "alert" in rule:
                rule["for"] = "2s"
    copy = folder / "hurried.yaml"
    copy.write_text(yaml.safe_dump(document))
    return copy
