"""Makes the schemas beside this file from the operators' own CRD files: `python strip.py FOLDER`.

Keeps the schema of `spec` of one version of each kind, without descriptions; nothing else is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "ray.io_rayservices": "v1",
    "monitoring.coreos.com_podmonitors": "v1",
    "monitoring.coreos.com_prometheusrules": "v1",
    "monitoring.coreos.com_scrapeconfigs": "v1alpha1",
    "gateway.networking.k8s.io_httproutes": "v1",
    "gateway.networking.k8s.io_grpcroutes": "v1",
}


def stripped(node: Any, named: bool = False) -> Any:
    """Without descriptions; `named`: the keys of `node` are names of fields, of which one may be `description`."""
    if isinstance(node, list):
        return [stripped(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: stripped(value, named=key == "properties" and not named)
        for key, value in node.items()
        if named or key != "description"
    }


def main() -> None:
    """Writes GROUP_KINDS.json for each of KINDS."""
    source, here = Path(sys.argv[1]), Path(__file__).parent
    for name, version in KINDS.items():
        crd = yaml.load((source / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
        (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version)
        made = {
            "apiVersion": f"{crd['spec']['group']}/{version}",
            "kind": crd["spec"]["names"]["kind"],
            "spec": stripped(schema["properties"]["spec"]),
        }
        (here / f"{name}.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
