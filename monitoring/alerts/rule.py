"""Alerting and recording rules as data, and the documents of them that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from monitoring.links import board_path, runbook

Severity = Literal["page", "ticket"]  # page: somebody must act now; ticket: within days


@dataclass(frozen=True)
class Record:
    """One recorded series. Its name is LEVEL:METRIC:OPERATION, as Prometheus' documentation advises."""

    name: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def document(self, _runbooks: str) -> dict[str, object]:
        """Return the document that Prometheus reads."""
        labels = {"labels": dict(self.labels)} if self.labels else {}
        return {"record": self.name, "expr": self.expr, **labels}


@dataclass(frozen=True)
class Alert:
    """One condition. Several with one name are one alert of several severities, with one runbook."""

    name: str
    expr: str
    wait: str  # how long the condition must hold; "0s": at once
    severity: Severity
    summary: str
    description: str  # with the value
    board: str  # dashboard that shows it
    labels: Mapping[str, str] = field(default_factory=dict)

    def document(self, runbooks: str) -> dict[str, object]:
        """Return the document that Prometheus reads; `runbooks` is the base of the pages' URLs."""
        annotations = {
            "summary": self.summary,
            "description": self.description,
            "runbook_url": runbook(runbooks, self.name),
            "dashboard": board_path(self.board),
        }
        labels = {"severity": self.severity, **self.labels}
        return {"alert": self.name, "expr": self.expr, "for": self.wait, "labels": labels, "annotations": annotations}


@dataclass(frozen=True)
class Group:
    """Rules that Prometheus evaluates one after the other, every `interval`."""

    name: str
    interval: str
    rules: Sequence[Record | Alert]

    def document(self, runbooks: str) -> dict[str, object]:
        """Return the document that Prometheus reads."""
        return {"name": self.name, "interval": self.interval, "rules": [rule.document(runbooks) for rule in self.rules]}
