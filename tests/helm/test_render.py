"""Every profile and every option renders, and what is rendered is valid wherever it is sent."""

from __future__ import annotations

import json

import pytest

from tests.helm.chart import (
    CHART,
    NAME,
    PROFILES,
    Manifest,
    groups,
    helm,
    of_kind,
    pods,
    profile_arguments,
    render,
    the,
)  # fmt: skip
from tests.helm.matrix import MATRIX
from tests.helm.schemas import problems


@pytest.mark.parametrize("name", [None, *PROFILES])
def test_lint_is_clean(name: str | None) -> None:
    done = helm("lint", "--strict", CHART, *profile_arguments(name))
    assert done.returncode == 0, done.stdout
    assert "Fail" not in done.stderr, done.stderr  # lint itself takes `fail` for information
    assert "[WARNING]" not in done.stdout


def test_every_object_is_valid(rendered: dict[str, list[Manifest]]) -> None:
    seen: dict[str, str] = {}
    for row, objects in rendered.items():
        for manifest in [*objects, *(pod.as_object() for pod in pods(objects))]:
            if manifest["kind"] == "Certificate":
                continue  # cert-manager's schemas are not here
            seen.setdefault(json.dumps(manifest, sort_keys=True), row)
    found = {f"{row}: {problem}" for text, row in seen.items() for problem in problems(json.loads(text))}
    assert not found, "\n".join(sorted(found))
    assert len(seen) > 250


def test_wrong_objects_are_found() -> None:
    service = the(render(), "RayService")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replica"] = 1
    assert any("'replica' was unexpected" in problem for problem in problems(service))
    pod = pods(render())[0].as_object()
    pod["spec"]["containers"][0]["resource"] = {}
    assert len(problems(pod)) == 5  # one per version


def test_names_are_unique_and_short(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        names = [(o["kind"], o["metadata"]["name"]) for o in objects]
        assert len(set(names)) == len(names), row
        assert all(len(name) <= 63 for _, name in names), row
    long = render({"fullnameOverride": "x" * 40})
    assert all(len(o["metadata"]["name"]) <= 63 for o in long)


def test_objects_of_other_operators_wait_for_them() -> None:
    kinds = {"PodMonitor", "ScrapeConfig", "PrometheusRule", "HTTPRoute", "GRPCRoute"}
    assert not kinds & {o["kind"] for o in render(apis=())}
    here = {o["kind"] for o in render()}
    assert {"PodMonitor", "ScrapeConfig"} <= here
    assert not {"HTTPRoute", "GRPCRoute"} & here  # they need a Gateway's name
    forced = {kind: {"enabled": True} for kind in ("podMonitor", "scrapeConfig", "prometheusRule")}
    assert {"PodMonitor", "ScrapeConfig"} <= {o["kind"] for o in render({"monitoring": forced}, apis=())}
    routes = {"parentRefs": [{"name": "g"}], "httpRoute": {"enabled": "auto"}, "grpcRoute": {"enabled": "auto"}}
    assert {"HTTPRoute", "GRPCRoute"} <= {o["kind"] for o in render({"gatewayApi": routes})}
    assert not {"HTTPRoute", "GRPCRoute"} & {o["kind"] for o in render({"gatewayApi": routes}, apis=())}


def test_services_select_gateways_only(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        for service in of_kind(objects, "Service"):
            clients = {port["name"] for port in service["spec"]["ports"]} & {"serve", "serve-grpc"}
            matching = {
                pod.role for pod in pods(objects)
                if service["spec"]["selector"].items() <= pod.metadata["labels"].items()
            }  # fmt: skip
            assert matching, f"{row}: {service['metadata']['name']} selects nothing"
            if clients:
                assert matching == {"gateway"}, f"{row}: {service['metadata']['name']}"


def test_each_group_has_the_probe_that_fits(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        tls = MATRIX[row][1].get("tls", {}).get("gateway", {}).get("mode", "generated") != "disabled"
        for name, group in groups(of_kind(objects, "RayService")[0]):
            (container,) = group["template"]["spec"]["containers"]
            probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
            ray = {"path": "/api/healthz", "port": 52365}
            ready = {"path": "/ready", "port": "serve", "scheme": "HTTPS" if tls else "HTTP"}
            assert probes == [ray, ray, ready if name == "gateway" else ray], f"{row}: {name}"


def test_cert_manager_fills_the_secrets_that_pods_mount(rendered: dict[str, list[Manifest]]) -> None:
    objects = rendered["cert-manager"]
    made = {o["spec"]["secretName"]: o["spec"] for o in of_kind(objects, "Certificate")}
    assert made.keys() == {f"{NAME}-tls", f"{NAME}-internal-tls"}
    assert not made.keys() & {o["metadata"]["name"] for o in of_kind(objects, "Secret")}
    volumes = [v for pod in pods(objects) if pod.role == "gateway" for v in pod.spec["volumes"]]
    assert made.keys() <= {v["secret"]["secretName"] for v in volumes if "secret" in v}
    assert f"{NAME}.models.svc" in made[f"{NAME}-tls"]["dnsNames"]
    assert made[f"{NAME}-internal-tls"]["dnsNames"] == ["deepsplit"]  # internal_tls.server_name
    assert set(made[f"{NAME}-internal-tls"]["usages"]) == {"server auth", "client auth"}
    assert all(spec["issuerRef"] == {"name": "ours", "kind": "ClusterIssuer"} for spec in made.values())


def test_the_service_protects_its_floor() -> None:
    def floors(objects: list[Manifest]) -> dict[str, int]:
        found = of_kind(objects, "PodDisruptionBudget")
        return {o["metadata"]["name"].removeprefix(f"{NAME}-"): o["spec"]["minAvailable"] for o in found}

    assert floors(render()) == {"gateway": 1, "attention": 1, "experts": 2}
    assert floors(render(base="deepseek-v3-hybrid")) == {"gateway": 1, "attention": 1, "experts": 7}
    assert floors(render({"attention": {"replicas": 5}})) == {"gateway": 1, "attention": 4, "experts": 2}


def test_one_value_sets_every_time_of_a_stream(rendered: dict[str, list[Manifest]]) -> None:
    objects = render({"longestStreamSeconds": 1234})
    for pod in pods(objects):
        if pod.role != "test":
            assert pod.spec["terminationGracePeriodSeconds"] == 1294
            hook = pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert hook == ["python", "-m", "deployments.directory.node_drain", "--wait-s", "1234"]


def test_scaling_attention_changes_nothing_else() -> None:
    def without_numbers(objects: list[Manifest]) -> str:
        service = the(objects, "RayService")
        group = next(g for name, g in groups(service) if name == "attention")
        for key in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(key)
        config = service["spec"].pop("serveConfigV2")
        return json.dumps(service, sort_keys=True) + config[: config.index("deployments:")]

    assert without_numbers(render({"attention": {"replicas": 1}})) == without_numbers(
        render({"attention": {"replicas": 3}})
    )
    assert without_numbers(render()) != without_numbers(render({"config": {"attention": {"max_num_seqs": 7}}}))
