"""Files and functions that the README and docs/ name are there, vLLM's own included."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
_NAMED = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.py)(?::([A-Za-z_][\w.]*\w))?")


@cache
def tracked() -> frozenset[str]:
    """Files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return frozenset(subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines())


def names() -> Iterator[tuple[str, str, str]]:
    """Page, file and function (or "") of each mention."""
    for page in PAGES:
        for file, function in sorted(set(_NAMED.findall(page.read_text()))):
            yield page.name, file, function


def resolve(file: str) -> Path | None:
    """The file below the repository or vLLM's package; without a folder, the only one of that name."""
    if file.startswith("vllm/"):
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        found = Path(spec.origin).parents[1] / file
        return found if found.exists() else None
    if "/" in file:
        return REPOSITORY / file if file in tracked() and (REPOSITORY / file).exists() else None
    same = [REPOSITORY / one for one in tracked() if one.rpartition("/")[2] == file and not one.startswith("tests/")]
    return same[0] if len(same) == 1 else None


def defines(file: Path, dotted: str) -> bool:
    """Whether the file has this function, class or Class.method."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for name in dotted.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize(("page", "file", "function"), names())
def test_it_is_there(page: str, file: str, function: str) -> None:
    found = resolve(file)
    assert found is not None, f"{page} names {file}, which there is not (or, without its folder, more than once)"
    assert not function or defines(found, function), f"{page} names {file}:{function}; {file} has no such function"


def test_what_is_not_there_is_noticed() -> None:
    assert resolve("routing/tokens/clients.py") is None
    assert resolve("replica.py") is None  # of which there are several
    assert not defines(REPOSITORY / "routing/tokens/client.py", "ExpertClient.send")
    assert defines(REPOSITORY / "routing/tokens/client.py", "ExpertClient.begin")
    assert ("README.md", "routing/tokens/client.py", "ExpertClient.begin") in set(names())
