"""Each promise of the chart about security, stated once and checked on all that any row of the matrix renders."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helm.chart import Manifest, Pod, of_kind, pods, render
from tests.helm.matrix import MATRIX

RAY_ROLES = {"head", "gateway", "attention", "experts"}
PodCheck = Callable[[str, Pod], bool]


def each_container(check: Callable[[Manifest], bool]) -> PodCheck:
    return lambda row, pod: all(check(container) for container in pod.containers)


def security(container: Manifest, key: str) -> Any:
    return container["securityContext"][key]


def only_the_autoscaler_has_a_token(row: str, pod: Pod) -> bool:
    scales = MATRIX[row][1].get("ray", {}).get("autoscaler", {}).get("enabled", False)
    return pod.spec["automountServiceAccountToken"] is (scales and pod.role == "head")


def host_paths_are_asked_for(row: str, pod: Pod) -> bool:
    asked = row == "hostPath"
    return asked or not any("hostPath" in volume for volume in pod.spec.get("volumes", []))


def is_pinned(image: str) -> bool:
    return bool(re.search(r"@sha256:[0-9a-f]{64}$", image) or re.search(r":(?!latest$)[\w][\w.-]*$", image))


def writable_places(container: Manifest) -> set[str]:
    return {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}


PROMISES: dict[str, PodCheck] = {
    "no root": lambda _, pod: pod.spec["securityContext"]["runAsNonRoot"] is True,
    "a user of its own": lambda _, pod: pod.spec["securityContext"]["runAsUser"] > 0,
    "no root, container by container": each_container(lambda c: security(c, "runAsNonRoot") is True),
    "seccomp": lambda _, pod: pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
    "read-only root file system": each_container(lambda c: security(c, "readOnlyRootFilesystem") is True),
    "no privilege escalation": each_container(lambda c: security(c, "allowPrivilegeEscalation") is False),
    "not privileged": each_container(lambda c: security(c, "privileged") is False),
    "no capabilities": each_container(lambda c: security(c, "capabilities") == {"drop": ["ALL"]}),
    "no token that is not used": only_the_autoscaler_has_a_token,
    "nothing of the host": lambda _, pod: not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(),
    "no host port": each_container(lambda c: not any("hostPort" in port for port in c.get("ports", []))),
    "no host path that was not asked for": host_paths_are_asked_for,
    "limits": each_container(lambda c: {"cpu", "memory"} <= c["resources"]["limits"].keys()),
    "pinned images": each_container(lambda c: is_pinned(c["image"])),
    "writable places are scratch": each_container(
        lambda c: writable_places(c) <= {"/tmp", "/dev/shm"} or c["name"] == "fetch-model"
    ),
    "bounded scratch": lambda _, pod: all("sizeLimit" in v["emptyDir"] for v in pod.spec["volumes"] if "emptyDir" in v),
    "no services in the environment": lambda _, pod: pod.spec["enableServiceLinks"] is False,
    "no secret in the environment": each_container(
        lambda c: not any(re.search(r"(?i)key|token|password|secret", e["name"]) and "value" in e for e in c["env"])
    ),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_every_pod_keeps(promise: str, rendered: dict[str, list[Manifest]]) -> None:
    kept, broken = 0, []
    for row, objects in rendered.items():
        for pod in pods(objects):
            kept += 1
            if not PROMISES[promise](row, pod):
                broken.append(f"{row}: {pod.where}")
    assert not broken, f"{promise}: {broken}"
    assert kept >= 5 * len(rendered)  # head, gateway, attention, experts, test


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_can_be_broken(promise: str) -> None:
    """The same checks see a pod that promises nothing."""
    container = {
        "name": "c", "image": "deepsplit:latest", "env": [{"name": "API_KEY", "value": "ds-x"}],
        "ports": [{"hostPort": 1}], "resources": {"limits": {"cpu": 1}},
        "volumeMounts": [{"mountPath": "/etc"}],
        "securityContext": {"runAsNonRoot": False, "readOnlyRootFilesystem": False, "allowPrivilegeEscalation": True,
                            "privileged": True, "capabilities": {"add": ["ALL"]}},
    }  # fmt: skip
    spec = {
        "containers": [container], "hostNetwork": True, "automountServiceAccountToken": True,
        "enableServiceLinks": True,
        "volumes": [{"hostPath": {"path": "/"}}, {"emptyDir": {}}],
        "securityContext": {"runAsNonRoot": False, "runAsUser": 0, "seccompProfile": {"type": "Unconfined"}},
    }  # fmt: skip
    assert not PROMISES[promise]("defaults", Pod("bad", "gateway", {}, spec))


def test_the_container_that_kuberay_adds_is_restricted_too(rendered: dict[str, list[Manifest]]) -> None:
    options = of_kind(rendered["autoscaling"], "RayService")[0]["spec"]["rayClusterConfig"]["autoscalerOptions"]
    pod = pods(rendered["autoscaling"])[0].spec["containers"][0]
    assert options["securityContext"] == pod["securityContext"]
    assert {"cpu", "memory"} <= options["resources"]["limits"].keys()


# --- networks ----------------------------------------------------------------------------------------------


def allowed_ports(objects: list[Manifest], role: str, who: dict[str, str]) -> Iterator[object]:
    """What the policies let a pod with labels `who` of the same namespace reach at `role`; "all" for every port."""
    for policy in of_kind(objects, "NetworkPolicy"):
        if policy["spec"]["podSelector"]["matchLabels"].get("deepsplit.io/role") != role:
            continue
        for rule in policy["spec"].get("ingress", []):
            if "from" not in rule or any(selects(peer.get("podSelector", {}), who) for peer in rule["from"]):
                yield from [port["port"] for port in rule["ports"]] if "ports" in rule else ["all"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []) if e["operator"] == "In"
    )
    return selector.get("matchLabels", {}).items() <= labels.items() and expressions


def test_everything_is_denied_first(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        if row == "no policies":
            assert not of_kind(objects, "NetworkPolicy")
            continue
        deny = [p["spec"] for p in of_kind(objects, "NetworkPolicy") if not {"ingress", "egress"} & p["spec"].keys()]
        (spec,) = deny
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        for pod in pods(objects):
            assert spec["podSelector"]["matchLabels"].items() <= pod.metadata["labels"].items(), f"{row}: {pod.where}"


def test_who_reaches_whom() -> None:
    objects = render({"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "client"}}}]}})
    labels = {pod.role: pod.metadata["labels"] for pod in pods(objects)}
    for role in RAY_ROLES:
        assert list(allowed_ports(objects, role, {"app": "stranger"})) == []
        assert list(allowed_ports(objects, role, labels["experts"])) == ["all"]
        assert list(allowed_ports(objects, role, {"app": "client"})) == ([8000, 9000] if role == "gateway" else [])
        assert list(allowed_ports(objects, role, labels["test"])) == ([8000, 9000] if role == "gateway" else [])
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert list(allowed_ports(objects, "head", operator)) == [8265]
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    assert set(allowed_ports(objects, "experts", prometheus)) == {8080, 9400}
    assert set(allowed_ports(render(), "gateway", {"app": "anybody"})) == {8000, 9000}


def test_egress_is_names_and_our_own_nodes_unless_more_is_needed(rendered: dict[str, list[Manifest]]) -> None:
    needs = {"objectStore", "policies", "autoscaling", "experts by load", "redis", "redis without password"}
    for row, objects in rendered.items():
        for policy in of_kind(objects, "NetworkPolicy"):
            for rule in policy["spec"].get("egress", []):
                assert "to" in rule or row in needs, f"{row}: {policy['metadata']['name']}"


# --- secrets -----------------------------------------------------------------------------------------------


def test_no_secret_is_the_same_twice_and_none_is_written_down() -> None:
    first, second = ({o["metadata"]["name"]: o for o in of_kind(render(), "Secret")} for _ in range(2))
    assert first.keys() == second.keys() == {
        f"dsplit-deepsplit-{name}" for name in ("keys", "operator-key", "tls", "internal-tls")
    }  # fmt: skip
    for name, secret in first.items():
        data = secret.get("data", {}) | secret.get("stringData", {})
        other = second[name].get("data", {}) | second[name].get("stringData", {})
        assert all(data[key] != other[key] for key in data), name
    key = base64.b64decode(first["dsplit-deepsplit-operator-key"]["data"]["key"]).decode()
    assert re.fullmatch(r"ds-[0-9A-Za-z]{43}", key)  # 256 bits
    for manifest in render():
        if manifest["kind"] != "Secret":
            assert not re.search(r"ds-[0-9A-Za-z]{8,}|PRIVATE KEY", str(manifest)), manifest["kind"]


def test_ray_wants_its_token_unless_told_otherwise(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        mode = of_kind(objects, "RayService")[0]["spec"]["rayClusterConfig"]["authOptions"]["mode"]
        assert mode == ("disabled" if row == "ray without token" else "token"), row
