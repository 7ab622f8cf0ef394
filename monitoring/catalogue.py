"""Lists every metric that metrics.py declares; `python -m monitoring.catalogue > docs/metrics.md` writes the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric

from monitoring import metrics

# Who emits it (the target's label `role`; None: all), and where it is declared.
_HOMES: tuple[tuple[str | None, type], ...] = (
    (None, metrics.ProcessMetrics),
    ("gateway", metrics.GatewayMetrics),
    ("directory", metrics.DirectoryMetrics),
    ("attention", metrics.EngineMetrics),
    ("engine", metrics.DispatchMetrics),
    ("engine", metrics.RoutingFamilies),
    ("experts", metrics.ExpertMetrics),
)
_UNITS = ("seconds", "bytes", "ratio", "tokens", "rows", "requests")
TARGET_LABELS = {
    "job": "`deepsplit`",
    "instance": "host:port of the scrape target",
    "role": "`gateway`, `admission`, `directory`, `attention` (its Serve process, with vLLM's own metrics), `engine` "
            "(vLLM's engine process, which dispatches), `experts`; `ray` for Ray's node agents",
    "node": "address of the node",
    "worker": "id of the gateway, attention replica or expert worker",
    "model": "name of the model",
}  # fmt: skip

_HEAD = """# Metrics

Generated from `monitoring/metrics.py` by `python -m monitoring.catalogue > docs/metrics.md`; do not edit.

Each process is a scrape target of its own. Counters only ever grow, until their process restarts. Histograms have the
series `_bucket`, `_count` and, if their values cannot be negative, `_sum`. `process_*` (memory, CPU time, open files)
are there for every process, vLLM's own `vllm:*` on targets with `role="attention"`, Ray's `ray_*` on those with
`role="ray"`.

Labels that service discovery adds to all of them:

| label | value |
|---|---|
"""


@dataclass(frozen=True)
class Declared:
    """A metric as metrics.py declares it."""

    name: str  # as exposed: with `_total` for counters, `_info` for infos
    kind: str
    labels: tuple[str, ...]
    meaning: str
    role: str | None  # of the processes that emit it; None: every one
    signed: bool  # a histogram with buckets below 0, of which a sum means nothing

    def series(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the series that queries can use: name and own labels."""
        if self.kind == "histogram":
            yield f"{self.name}_bucket", (*self.labels, "le")
            if not self.signed:
                yield f"{self.name}_sum", self.labels
            yield f"{self.name}_count", self.labels
        else:
            yield self.name, self.labels

    @property
    def unit(self) -> str:
        """Return the unit, read off the name by Prometheus' naming rules; empty for a plain count."""
        words = self.name.removesuffix("_total").split("_")
        if "timestamp" in words:
            return "Unix time, seconds"
        return words[-1] if words[-1] in _UNITS else ""


def declared() -> list[Declared]:
    """Return every metric, in the order of declaration."""
    return [metric for role, home in _HOMES for metric in _of(role, home)]


def _of(role: str | None, home: type) -> Iterator[Declared]:
    made = home() if home is metrics.RoutingFamilies else home(CollectorRegistry())
    for attribute in vars(made).values():
        family: Metric = attribute if isinstance(attribute, Metric) else next(iter(attribute.describe()))
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        # The library has no public way to ask for these two.
        labels, signed = tuple(attribute._labelnames), getattr(attribute, "_upper_bounds", (0.0,))[0] < 0
        yield Declared(family.name + suffix, family.type, labels, family.documentation, role, signed)


def reference() -> str:
    """Return the page docs/metrics.md."""
    labels = "".join(f"| `{label}` | {value} |\n" for label, value in TARGET_LABELS.items())
    return _HEAD + labels + "".join(_sections())


def _sections() -> Iterator[str]:
    last: object = ""
    for metric in declared():
        if metric.role != last:
            last = metric.role
            yield f"\n## {f'`role={metric.role}`' if metric.role else 'Every process'}\n\n"
            yield "| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n"
        shown = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.kind} | {metric.unit} | {shown} | {metric.meaning} |\n"


if __name__ == "__main__":
    print(reference(), end="")
