"""The chart through the real helm: rendered objects, or what helm says against the values."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "deepsplit"
PROFILES = ("demo", "deepseek-v3-gpu", "deepseek-v3-hybrid")
RELEASE, NAMESPACE = "dsplit", "models"
NAME = f"{RELEASE}-deepsplit"
CUSTOM = (
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1alpha1/ScrapeConfig",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "gateway.networking.k8s.io/v1/GRPCRoute",
)

Manifest = dict[str, Any]


class HelmError(Exception):
    """helm refused; the message is its stderr."""


def helm(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """One run of the helm that the environment brings."""
    beside = Path(sys.executable).parent / "helm"
    command = str(beside) if beside.exists() else shutil.which("helm")
    assert command is not None, "helm is not installed: run `make env`"
    return subprocess.run(
        [command, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def profile(name: str) -> Path:
    """The values file of a ready profile."""
    return CHART / f"values-{name}.yaml"


def profile_arguments(name: str | None) -> list[str]:
    """helm's option for a profile; nothing for the defaults."""
    return [] if name is None else ["--values", str(profile(name))]


def render(
    values: Mapping[str, Any] | None = None, base: str | None = None, apis: Sequence[str] = CUSTOM, *more: str
) -> list[Manifest]:
    """What `helm template` makes of the profile `base` and `values` on top. Raises HelmError."""
    arguments = ["template", RELEASE, str(CHART), "--namespace", NAMESPACE, *profile_arguments(base), *more]
    for api in apis:
        arguments += ["--api-versions", api]
    done = helm(*arguments, "--values", "-", stdin=json.dumps(dict(values or {})))
    if done.returncode != 0:
        raise HelmError(done.stderr)
    return [found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found]


def of_kind(objects: Sequence[Manifest], kind: str, name: str | None = None) -> list[Manifest]:
    """The objects of one kind, and of one name."""
    return [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]


def the(objects: Sequence[Manifest], kind: str, name: str = NAME) -> Manifest:
    """The one object of this kind and name."""
    (found,) = of_kind(objects, kind, name)
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that is rendered, by itself or as a template of a RayService."""

    where: str
    role: str
    metadata: Manifest
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """All of them, init containers included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def as_object(self) -> Manifest:
        """A Pod as it could be created."""
        metadata = copy.deepcopy(self.metadata) | {"name": "pod"}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}


def groups(service: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Head and worker groups of a RayService, by name."""
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def pods(objects: Sequence[Manifest]) -> list[Pod]:
    """Every pod that these objects would make."""
    found = []
    for manifest in objects:
        if manifest["kind"] == "RayService":
            for name, group in groups(manifest):
                metadata, spec = group["template"]["metadata"], group["template"]["spec"]
                found.append(Pod(f"group {name}", metadata["labels"]["deepsplit.io/role"], metadata, spec))
        elif manifest["kind"] == "Pod":
            metadata = manifest["metadata"]
            found.append(Pod(metadata["name"], metadata["labels"]["deepsplit.io/role"], metadata, manifest["spec"]))
        else:
            assert "template" not in manifest.get("spec", {}), f"{manifest['kind']}: pods that no test looks at"
    return found


def serve_config(objects: Sequence[Manifest]) -> Manifest:
    """`serveConfigV2`, parsed."""
    config: Manifest = yaml.safe_load(the(objects, "RayService")["spec"]["serveConfigV2"])
    return config
