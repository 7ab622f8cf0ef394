"""What must not change between two versions of the chart, or an upgrade fails or leaves things behind.

`python -m tests.helm.identity > tests/helm/installed/VERSION.json` records it for a release, once: each object with the
first row of the matrix that has it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from tests.helm.chart import Manifest, groups, render
from tests.helm.matrix import MATRIX


def identity(objects: Sequence[Manifest]) -> dict[str, Any]:
    """By kind and name: selectors, and fields that Kubernetes refuses to change."""
    return {f"{o['kind']} {o['metadata']['name']}": _fixed(o) for o in objects if o["kind"] != "Pod"}


def _fixed(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Service":
            return {"selector": spec["selector"], "headless": spec.get("clusterIP") == "None", "ports": _ports(spec)}
        case "Secret":
            data = manifest.get("data", {}) | manifest.get("stringData", {})
            return {"type": manifest["type"], "keys": sorted(data)}
        case "PodDisruptionBudget":
            return {"selector": spec["selector"]}
        case "NetworkPolicy":
            return {"selector": spec["podSelector"]}
        case "ConfigMap":
            return {"keys": sorted(manifest["data"])}
        case "RayService":
            labels = {name: _selected_by(group) for name, group in groups(manifest)}
            return {"groups": labels, "managedBy": spec.get("managedBy")}
    return {}


def _ports(spec: Manifest) -> list[str]:
    return sorted(port["name"] for port in spec["ports"])


def _selected_by(group: Manifest) -> dict[str, str]:
    labels = group["template"]["metadata"]["labels"]
    keys = ("app.kubernetes.io/instance", "app.kubernetes.io/part-of", "deepsplit.io/role")
    return {key: labels[key] for key in keys}


def recorded() -> dict[str, dict[str, Any]]:
    """The file's content: by row of the matrix, what no earlier row has."""
    seen: list[tuple[str, Any]] = []
    made: dict[str, dict[str, Any]] = {}
    for row, (base, values) in MATRIX.items():
        new = {key: fixed for key, fixed in identity(render(values, base)).items() if (key, fixed) not in seen}
        seen += new.items()
        if new:
            made[row] = new
    return made


if __name__ == "__main__":
    json.dump(recorded(), sys.stdout, indent=1)
    print()
