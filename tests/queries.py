"""What PromQL queries read: metrics that somebody declares, with labels that they have.

`labels_of` works out which labels a query's result has, and rejects what Prometheus would silently answer with nothing:
a metric or label that does not exist, two operands whose labels never match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql

from monitoring.alerts.__main__ import all_groups
from monitoring.alerts.rule import Record
from monitoring.catalogue import TARGET_LABELS, declared

TARGET = frozenset(TARGET_LABELS)
# Not ours, but on our targets; tests/integration/test_observability.py sees that each is really there.
BORROWED: Mapping[str, tuple[str, ...]] = {
    "up": (),
    "ALERTS": ("alertname", "alertstate", "severity"),
    "process_cpu_seconds_total": (),
    "process_resident_memory_bytes": (),
    "process_start_time_seconds": (),
    "process_open_fds": (),
    "process_max_fds": (),
    "vllm:num_preemptions_total": ("engine", "model_name"),
    "vllm:generation_tokens_total": ("engine", "model_name"),
    "vllm:prompt_tokens_total": ("engine", "model_name"),
    "vllm:prefix_cache_queries_total": ("engine", "model_name"),
    "vllm:prefix_cache_hits_total": ("engine", "model_name"),
    "ray_node_cpu_utilization": (),
    "ray_node_mem_used": (),
    "ray_node_mem_total": (),
}
_FILTERS = ("topk", "bottomk")  # these keep their operand's labels
_WITHOUT_LABELS = ("time", "vector", "scalar")
_SET_OPERATORS = ("and", "or", "unless")
_VARIABLES = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


class QueryFault(Exception):
    """A query that would never return what it is meant to."""


def substituted(query: str, values: Mapping[str, str]) -> str:
    """Grafana's query as Prometheus gets it; dashboard variables that are not given match everything."""
    for name, value in {**_VARIABLES, **{f"${name}": value for name, value in values.items()}}.items():
        query = query.replace(name, value)
    return re.sub(r"\$[a-z]\w*", ".*", query)


def known_series() -> dict[str, frozenset[str]]:
    """Every name that a query may use, with all its labels."""
    known = {name: TARGET | set(labels) for metric in declared() for name, labels in metric.series()}
    known |= {name: TARGET | set(labels) for name, labels in BORROWED.items()}
    for group in all_groups():
        for rule in group.rules:
            if isinstance(rule, Record):
                known[rule.name] = labels_of(rule.expr, known) | set(rule.labels)
    return known


def labels_of(query: str, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """Labels that the result may have. Raises QueryFault."""
    try:
        parsed = promql.parse(query)
    except ValueError as error:
        raise QueryFault(f"{query}: {error}") from error
    return _labels(parsed, known)


def selectors(query: str) -> list[promql.VectorSelector]:
    """Every series selector in a query."""
    return list(_selectors(promql.parse(query)))


def runbook_queries(page: Path) -> list[str]:
    """What a runbook page tells its reader to ask Prometheus."""
    blocks = re.findall(r"^```promql\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def _selectors(node: Any) -> Iterator[promql.VectorSelector]:
    if isinstance(node, promql.VectorSelector):
        yield node
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql.BinaryExpr):
        yield from _selectors(node.lhs)
        yield from _selectors(node.rhs)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _selectors(argument)
    elif hasattr(node, "expr"):
        yield from _selectors(node.expr)


def _labels(node: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    if isinstance(node, promql.VectorSelector):
        return _selected(node, known)
    if isinstance(node, promql.MatrixSelector):
        return _selected(node.vector_selector, known)
    if isinstance(node, promql.AggregateExpr):
        return _aggregated(node, _labels(node.expr, known))
    if isinstance(node, promql.BinaryExpr):
        return _joined(node, known)
    if isinstance(node, promql.Call):
        return _called(node, known)
    return _labels(node.expr, known) if hasattr(node, "expr") else frozenset()


def _selected(node: promql.VectorSelector, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    if node.name not in known:
        raise QueryFault(f"nobody declares {node.name}")
    _need({matcher.name for matcher in node.matchers.matchers}, known[node.name], node)
    return known[node.name]


def _aggregated(node: promql.AggregateExpr, inner: frozenset[str]) -> frozenset[str]:
    if str(node.op) in _FILTERS:
        return inner
    if node.modifier is None:
        return frozenset()
    _need(node.modifier.labels, inner, node)
    by = node.modifier.type == promql.AggModifierType.By
    return frozenset(node.modifier.labels) if by else inner - set(node.modifier.labels)


def _called(node: promql.Call, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    name = node.func.name
    arguments = [_labels(argument, known) for argument in node.args]
    if name in _WITHOUT_LABELS or not arguments:
        return frozenset()
    if name == "histogram_quantile":
        _need({"le"}, arguments[1], node)
        return arguments[1] - {"le"}
    return frozenset().union(*arguments)


def _joined(node: promql.BinaryExpr, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if _is_scalar(node.lhs) or _is_scalar(node.rhs):
        return left | right
    operator, matching = str(node.op), node.modifier.matching if node.modifier else None
    if operator == "or":
        return left | right
    if matching is None:
        matched, left_rest, right_rest = left & right, left, right
    elif matching.type == promql.LabelModifierType.Include:
        matched = left_rest = right_rest = frozenset(matching.labels)
        _need(matched, left, node)
        _need(matched, right, node)
    else:
        left_rest, right_rest = left - set(matching.labels), right - set(matching.labels)
        matched = left_rest & right_rest
    if left_rest != right_rest:
        raise QueryFault(f"{node}: labels {sorted(left_rest)} never match {sorted(right_rest)}")
    if operator in _SET_OPERATORS or node.modifier is None:
        return left
    cardinality = node.modifier.card
    if cardinality == promql.VectorMatchCardinality.ManyToOne:
        return left
    return right if cardinality == promql.VectorMatchCardinality.OneToMany else matched


def _is_scalar(node: Any) -> bool:
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr):
        return _is_scalar(node.expr)
    if isinstance(node, promql.BinaryExpr):
        return _is_scalar(node.lhs) and _is_scalar(node.rhs)
    if isinstance(node, promql.Call):
        return node.func.name in ("time", "scalar")
    return isinstance(node, promql.NumberLiteral)


def _need(names: Any, there: frozenset[str], node: Any) -> None:
    missing = set(names) - there
    if missing:
        raise QueryFault(f"{node}: no label {sorted(missing)}, only {sorted(there)}")
