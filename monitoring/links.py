"""The links in alerts and dashboards. Their bases are parameters of the generators."""

from __future__ import annotations

RUNBOOKS = "https://deepsplit.example/docs/runbooks"  # reserved name: put your own with `make rules RUNBOOKS=…`
BOARDS = ("overview", "gateway", "attention", "experts", "dispatcher")


def runbook(base: str, alert: str) -> str:
    """Return the URL of an alert's page in docs/runbooks."""
    return f"{base.rstrip('/')}/{alert}.md"


def board_uid(board: str) -> str:
    """Return Grafana's id of a dashboard."""
    assert board in BOARDS, board
    return f"deepsplit-{board}"


def board_path(board: str) -> str:
    """Return the path of a dashboard, below Grafana's own address."""
    return f"/d/{board_uid(board)}"
