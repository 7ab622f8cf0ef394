"""Calls through Ray's handles are not typed: each one to the directory names a method with as many arguments."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.directory.replica import Directory

REPOSITORY = Path(__file__).parents[4]


def calls() -> Iterator[tuple[str, str, int]]:
    """File, method and number of arguments of each `directory.METHOD.remote(...)`."""
    for file in sorted((REPOSITORY / "deployments").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(value=handle, attr=method), attr="remote"), args=args
                ) if ast.unparse(handle).endswith("directory"):
                    yield str(file.relative_to(REPOSITORY)), method, len(args)


CALLS = list(calls())


@pytest.mark.parametrize(("file", "method", "arguments"), CALLS)
def test_the_directory_has_what_is_asked_of_it(file: str, method: str, arguments: int) -> None:
    inspect.signature(getattr(Directory, method)).bind(None, *range(arguments))


def test_all_callers_are_seen() -> None:
    expected = {"join", "heartbeat", "poll_table", "register_gateway", "register_admission"}
    assert expected <= {method for _, method, _ in CALLS}
