"""Dashboards: up to date, readable at every size, and asking only for what somebody declares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from monitoring.alerts.__main__ import all_groups
from monitoring.alerts.rule import Alert
from monitoring.boards.__main__ import all_boards
from monitoring.boards.board import Board, Chart, Query
from monitoring.boards.grafana import to_json
from monitoring.links import BOARDS, RUNBOOKS, board_uid
from tests.queries import known_series, labels_of, substituted
from tests.unit.monitoring.test_alerts import NAMES, promtool

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "monitoring" / "dashboards"
CHARTS = [(board, chart) for board in all_boards() for chart in board.charts()]
# As many as a cluster has processes, nodes, tenants or experts: a panel with one series for each is unreadable.
UNBOUNDED = {"instance", "worker", "node", "tenant", "expert_worker", "expert"}
MOST_SERIES = 10


def label(value: object) -> str:
    return getattr(value, "title", None) or str(value)


@pytest.mark.parametrize("board", all_boards(), ids=lambda board: board.name)
def test_the_file_is_the_generated_one(board: Board) -> None:
    file = FOLDER / f"{board.name}.json"
    assert file.read_text(encoding="utf-8") == to_json(board, RUNBOOKS), "run: make dashboards"


def test_there_are_no_other_files() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == {board.name for board in all_boards()} == set(BOARDS)


@pytest.mark.parametrize(("board", "chart"), CHARTS, ids=label)
def test_queries_read_only_what_is_declared(board: Board, chart: Chart) -> None:
    known = known_series()
    for query in chart.queries:
        labels = labels_of(substituted(query.expr, {}), known)
        shown = {part.split("}}")[0] for part in query.legend.split("{{")[1:]}
        assert shown <= labels, f"the legend has no {shown - labels}"
        assert shown or not labels or chart.kind == "matrix", f"{labels} are not told apart"


def test_prometheus_itself_accepts_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"q{number}:x", "expr": substituted(query.expr, {})}
        for number, query in enumerate(query for _, chart in CHARTS for query in chart.queries)
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": rules}]}))
    promtool("check", "rules", file)


@pytest.mark.parametrize(("board", "chart"), CHARTS, ids=label)
def test_readable_with_a_thousand_nodes(board: Board, chart: Chart) -> None:
    known = known_series()
    for query in chart.queries:
        unbounded = labels_of(substituted(query.expr, {}), known) & UNBOUNDED
        if chart.kind == "matrix":
            assert query.expr.startswith("topk(")
        elif unbounded:
            count = query.expr.removeprefix("topk(").split(",")[0]
            assert count in map(str, range(1, MOST_SERIES + 1)), f"a series for each {unbounded}"


@pytest.mark.parametrize(("board", "chart"), CHARTS, ids=label)
def test_panels_explain_themselves(board: Board, chart: Chart) -> None:
    assert chart.unit
    assert len(chart.bad.split()) >= 5
    assert chart.bad.endswith(".")
    assert not chart.alert or chart.alert in NAMES


def test_every_alert_is_on_the_board_that_it_names() -> None:
    """An operator who follows the link finds what the alert is about."""
    for group in all_groups():
        for alert in group.rules:
            if isinstance(alert, Alert):
                board = next(board for board in all_boards() if board.name == alert.board)
                assert any(chart.alert == alert.name for chart in board.charts()), alert.name


@pytest.mark.parametrize("board", all_boards(), ids=lambda board: board.name)
def test_grafanas_document(board: Board) -> None:
    document = json.loads(to_json(board, "https://wiki/runbooks"))
    assert document["uid"] == board_uid(board.name)
    variables = {variable["name"]: variable for variable in document["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "node"} | ({"tenant"} if board.by_tenant else set())
    used = json.dumps([query.expr for chart in board.charts() for query in chart.queries])
    assert all(f"${name}" in used for name in variables if name != "datasource")
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    spots = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in document["panels"]}
    assert len(spots) == len(ids)
    for panel in document["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "$datasource"
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["description"]
    links = {link["title"] for link in document["links"]}
    assert links == {"deepsplit", "Runbooks"}
    runbooks = [link["url"] for panel in document["panels"] for link in panel.get("links") or ()]
    assert runbooks
    assert all(url.startswith("https://wiki/runbooks/Deepsplit") for url in runbooks)


def test_an_unreadable_panel_would_be_found() -> None:
    chart = Chart("x", "short", "One line for each worker.", (Query("deepsplit_expert_streams", "{{worker}}"),))
    with pytest.raises(AssertionError, match="a series for each"):
        test_readable_with_a_thousand_nodes(all_boards()[0], chart)
