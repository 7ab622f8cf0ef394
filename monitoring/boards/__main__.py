"""Writes the dashboards: `python -m monitoring.boards monitoring/dashboards`."""

from __future__ import annotations

import argparse
from pathlib import Path

from monitoring.boards.attention import ATTENTION
from monitoring.boards.board import Board
from monitoring.boards.dispatcher import DISPATCHER
from monitoring.boards.experts import EXPERTS
from monitoring.boards.gateway import GATEWAY
from monitoring.boards.grafana import to_json
from monitoring.boards.overview import OVERVIEW
from monitoring.links import RUNBOOKS


def all_boards() -> list[Board]:
    """Return every dashboard."""
    return [OVERVIEW, GATEWAY, ATTENTION, EXPERTS, DISPATCHER]


def main() -> None:
    """Write the dashboards."""
    parser = argparse.ArgumentParser(prog="python -m monitoring.boards", description="Writes the dashboards.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runbooks", metavar="URL", default=RUNBOOKS, help="where docs/runbooks is served")
    arguments = parser.parse_args()
    for board in all_boards():
        file: Path = arguments.folder / f"{board.name}.json"
        file.write_text(to_json(board, arguments.runbooks), encoding="utf-8")


if __name__ == "__main__":
    main()
