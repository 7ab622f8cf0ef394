"""Rules and runbooks ask only for what somebody declares; the check itself sees what it must."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from monitoring import metrics
from monitoring.alerts.__main__ import all_groups
from monitoring.catalogue import TARGET_LABELS, declared, reference
from tests.queries import QueryFault, known_series, labels_of, runbook_queries

REPOSITORY = Path(__file__).parents[3]
RUNBOOKS = sorted((REPOSITORY / "docs" / "runbooks").glob("*.md"))
REPLIES = "deepsplit_dispatch_worker_replies_total"


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("deepsplit_reqests_total", "nobody declares"),
        ("deepsplit_requests", "nobody declares"),
        ("deepsplit_ttft_seconds", "nobody declares"),
        ("deepsplit_ttft_prediction_error_seconds_sum", "nobody declares"),
        ('deepsplit_requests_total{outcom="ok"}', "no label"),
        ("sum by (layer) (deepsplit_requests_total)", "no label"),
        ("histogram_quantile(0.5, sum by (class) (rate(deepsplit_ttft_seconds_bucket[5m])))", "no label"),
        ("sum by (class) (deepsplit_requests_total) / sum by (tenant) (deepsplit_requests_total)", "never match"),
        (f"sum by (model) ({REPLIES}) / on (expert_worker) sum by (model) ({REPLIES})", "no label"),
        (f"{REPLIES} * ignoring (worker) sum ({REPLIES})", "never match"),
        ("sum by (model (up)", "unclosed"),
    ],
)
def test_faults_are_found(query: str, fault: str) -> None:
    with pytest.raises(QueryFault, match=fault):
        labels_of(query, known_series())


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("sum by (model, class) (rate(deepsplit_requests_total[5m]))", {"model", "class"}),
        ("topk(5, deepsplit_engine_decode_slots)", set(TARGET_LABELS)),
        ("histogram_quantile(0.5, sum by (le) (rate(deepsplit_ttft_seconds_bucket[5m]))) > 3", set()),
        (f"sum by (model, expert_worker) ({REPLIES}) / on (model) group_left () sum by (model) ({REPLIES})",
         {"model", "expert_worker"}),
        (f"sum by (model) ({REPLIES}) - on (model) group_right () sum by (model, node) ({REPLIES})", {"model", "node"}),
        ("min by (role) (deepsplit_certificate_expiry_timestamp_seconds) - time() < 5", {"role"}),
    ],
)  # fmt: skip
def test_labels_are_worked_out(query: str, labels: set[str]) -> None:
    assert labels_of(query, known_series()) == labels


def test_rules_read_only_what_is_declared() -> None:
    known = known_series()
    for group in all_groups():
        for rule in group.rules:
            labels_of(rule.expr, known)


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda page: page.stem)
def test_runbooks_read_only_what_is_declared(page: Path) -> None:
    queries = runbook_queries(page)
    assert queries
    for query in queries:
        labels_of(query, known_series())


def test_every_declaration_is_in_the_catalogue() -> None:
    homes = {name for name, home in inspect.getmembers(metrics, inspect.isclass) if home.__module__ == metrics.__name__}
    source = inspect.getsource(inspect.getmodule(declared))
    assert {name for name in homes if f"metrics.{name}" not in source} == set()
    names = [metric.name for metric in declared()]
    assert len(names) == len(set(names)) > 50


def test_names_and_labels_follow_the_rules() -> None:
    for metric in declared():
        assert metric.name.startswith("deepsplit_"), metric.name
        assert metric.meaning.endswith("."), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        clash = set(metric.labels) & set(TARGET_LABELS)
        assert not clash, f"{metric.name}: service discovery adds {clash} too"


def test_reference_is_the_generated_one() -> None:
    page = REPOSITORY / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == reference(), "run: python -m monitoring.catalogue > docs/metrics.md"
