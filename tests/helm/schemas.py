"""Holds objects against Kubernetes' own schemas and against those of custom resources, both strictly."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from kubernetes_validate import utils

from tests.helm.chart import Manifest

VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34")
_CRDS = Path(__file__).parent / "crds"

# It reads the same file of several MB for each object.
utils.schema_contents = functools.cache(utils.schema_contents)


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with an object, in every version of Kubernetes. An unknown kind is a problem."""
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind in _custom():
        found = _custom()[kind].iter_errors(manifest["spec"])
        return [f"{manifest['kind']}: {error.json_path}: {error.message[:300]}" for error in found]
    return [f"{version} {problem}" for version in VERSIONS for problem in _core(manifest, version)]


def _core(manifest: Manifest, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{manifest['kind']} {manifest['metadata']['name']}: {error.json_path}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


@functools.cache
def _custom() -> dict[tuple[str, str], Draft202012Validator]:
    made = {}
    for path in sorted(_CRDS.glob("*.json")):
        crd = json.loads(path.read_text())
        made[crd["apiVersion"], crd["kind"]] = Draft202012Validator(_strict(crd["spec"]))
    return made


def _strict(node: Any, named: bool = False) -> Any:
    """A structural schema as JSON Schema, in which a field that is not listed is wrong: the API server would drop it
    without a word.
    """
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if named:
        return {key: _strict(value) for key, value in node.items()}
    made = {
        key: _strict(value, named=key == "properties")
        for key, value in node.items()
        if key not in ("format", "default", "nullable") and not key.startswith("x-")
    }
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["type"] = ["integer", "string"]
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("type") == "object" and "properties" in node and not open_ended:
        made["additionalProperties"] = False
    return made
