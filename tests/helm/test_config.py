"""The configuration that the chart makes of its values is deepsplit's own, and what is generated is up to date."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from cluster.config import Config
from cluster.config.file import load_config
from cluster.keys.file import parse_keys
from cluster.plan.checks import load_model, plan_for, validate
from cluster.plan.pools import expert_pools
from deployments.app import BuildArgs
from tests.helm.chart import CHART, NAME, PROFILES, ROOT, Manifest, groups, helm, of_kind, render, serve_config, the

ATTENTION, EXPERTS, GPU_EXPERTS = (
    {"resources": {f"deepsplit-{role}": 1}} for role in ("attention", "experts-cpu", "experts-gpu")
)
NODES: dict[str, list[dict[str, Any]]] = {
    "deepseek-v3-hybrid": [
        {"name": "gpu", "count": 2, "memory_gib": 256, "gpus": 8, "gpu_memory_gib": 80} | ATTENTION,
        {"name": "cpu", "count": 8, "memory_gib": 460} | EXPERTS,
    ],
    "deepseek-v3-gpu": [
        {"name": "gpu", "count": 2, "memory_gib": 256, "gpus": 8, "gpu_memory_gib": 141} | ATTENTION,
        {"name": "expert", "count": 16, "memory_gib": 64, "gpus": 1, "gpu_memory_gib": 141} | GPU_EXPERTS,
    ],
    "demo": [
        {"name": "attention", "count": 1, "memory_gib": 6} | ATTENTION,
        {"name": "experts", "count": 2, "memory_gib": 1.5} | EXPERTS,
    ],
}


def config_text(objects: list[Manifest]) -> str:
    text: str = the(objects, "ConfigMap", f"{NAME}-config")["data"]["deepsplit.yaml"]
    return text


def written(folder: Path, objects: list[Manifest], model: Path) -> Path:
    """The ConfigMap's file, with the model where it is here: in pods it is on a volume or in the image."""
    config = yaml.safe_load(config_text(objects))
    config["model"]["path"] = str(model)
    path = folder / "deepsplit.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def served_config(values: dict[str, Any]) -> Manifest:
    """The configuration that the pods get."""
    config: Manifest = serve_config(render(values))["applications"][0]["args"]["config"]
    return config


def model_of(profile: str, demo_model: Path) -> Path:
    return demo_model if profile == "demo" else ROOT / "examples" / "deepseek-v3"


@pytest.mark.parametrize("profile", PROFILES)
def test_it_passes_validate(profile: str, tmp_path: Path, demo_model: Path) -> None:
    path = written(tmp_path, render(base=profile), model_of(profile, demo_model))
    said = list(validate(load_config(path), 0.0))
    assert any(line.startswith("keys: /etc/deepsplit/keys/keys.yaml is not here") for line in said)
    assert any(line.startswith("index: ") for line in said)


@pytest.mark.parametrize("profile", PROFILES)
def test_it_fits_the_nodes_that_the_profile_asks_for(profile: str, tmp_path: Path, demo_model: Path) -> None:
    objects = render(base=profile)
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text(yaml.safe_dump(NODES[profile]))
    config = load_config(written(tmp_path, objects, model_of(profile, demo_model)))
    plan_for(config, load_model(config)[0], nodes).check()
    memory = {node["memory_gib"] for node in NODES[profile]}
    for name, group in groups(the(objects, "RayService")):
        limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert name in ("head", "gateway") or _gib(limit) in memory, name


def _gib(quantity: str) -> float:
    return float(quantity[:-2]) / {"Gi": 1, "Mi": 1024}[quantity[-2:]]


def test_every_row_of_the_matrix_is_a_configuration(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        (found,) = (o for o in of_kind(objects, "ConfigMap") if o["metadata"]["name"].endswith("-config"))
        whole = Config.model_validate(yaml.safe_load(found["data"]["deepsplit.yaml"]))
        (service,) = of_kind(objects, "RayService")
        served = yaml.safe_load(service["spec"]["serveConfigV2"])
        (application,) = served["applications"]
        assert served["proxy_location"] == "Disabled"
        assert application["import_path"] == "deployments.app:build"
        built = BuildArgs.model_validate(application["args"])
        given = built.config
        assert built.fixed_attention is (given.attention.autoscaling is None)
        (override,) = application.get("deployments", [{}])
        assert ("num_replicas" in override) is (given.attention.autoscaling is None)
        # Serve changes the number of attention replicas in place; nothing else differs.
        attention = given.attention.model_copy(update={"replicas": whole.attention.replicas})
        assert given.model_copy(update={"attention": attention}) == whole, row
        assert override.get("num_replicas", whole.attention.replicas) == whole.attention.replicas
        pods = {name: group["replicas"] for name, group in groups(service) if name != "head"}
        assert pods["gateway"] == whole.gateway.replicas
        assert pods["attention"] == whole.attention.replicas
        sizes = {name: group for name, group in groups(service) if name.startswith("experts-")}
        for pool in expert_pools(whole.experts):
            scaling, group = pool.autoscaling, sizes.pop(f"experts-{pool.name}")
            bounds = (len(pool.slots),) * 2 if scaling is None else (scaling.min_workers, scaling.max_workers)
            assert group["replicas"] == len(pool.slots)
            assert (group["minReplicas"], group["maxReplicas"]) == bounds
        assert not sizes


def test_each_role_goes_to_its_own_group(rendered: dict[str, list[Manifest]]) -> None:
    for row, objects in rendered.items():
        (service,) = of_kind(objects, "RayService")
        config = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["config"]
        asked = {role: config[role]["placement"]["resources"] for role in ("gateway", "attention")}
        asked |= {f"experts-{pool['name']}": pool["placement"]["resources"] for pool in config["experts"]["pools"]}
        offered = {name: group["resources"] for name, group in groups(service)}
        assert offered.pop("head") == {"CPU": "0"}
        assert offered.keys() == asked.keys(), row
        for name, wanted in asked.items():
            assert {key for key in offered[name] if key.startswith("deepsplit-")} == wanted.keys(), row


def test_gpu_and_cpu_experts_run_side_by_side(rendered: dict[str, list[Manifest]]) -> None:
    (service,) = of_kind(rendered["GPU and CPU experts"], "RayService")
    config = Config.model_validate(
        yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["config"]
    )
    cpu, gpu = expert_pools(config.experts)
    assert (cpu.name, cpu.experts.device, len(cpu.slots)) == ("cpu", "cpu", 4)
    assert (gpu.name, gpu.experts.device, len(gpu.slots)) == ("gpu", "cuda", 16)
    assert config.experts.worker_shares() == (3.0,) * 4 + (1.0,) * 16
    images = {
        name: group["template"]["spec"]["containers"][0]["image"].rsplit("-", 1)[1] for name, group in groups(service)
    }
    assert images == {"head": "cpu", "gateway": "cpu", "attention": "gpu", "experts-cpu": "cpu", "experts-gpu": "gpu"}


def test_threads_follow_the_limits() -> None:
    config = served_config({"attention": {"resources": {"limits": {"cpu": 6}}}})
    assert (config["attention"]["threads"], config["experts"]["pools"][0]["threads"]) == (6, 1)
    own = served_config({"config": {"attention": {"threads": 1}}})
    assert own["attention"]["threads"] == 1


def test_shares_follow_the_groups() -> None:
    values: dict[str, Any] = {
        "cpu": {"workers": 2},
        "large": {"workers": 1, "share": 2.5, "resources": {"limits": {"cpu": 1, "memory": "8Gi"}}},
    }
    config = served_config({"experts": {"groups": values}})
    assert config["experts"]["shares"] == [1, 1, 2.5]
    assert "shares" not in served_config({})["experts"]


def test_the_keys_file_is_one(rendered: dict[str, list[Manifest]]) -> None:
    text = the(rendered["tenants"], "Secret", f"{NAME}-keys")["stringData"]["keys.yaml"]
    operator, search = parse_keys(Path("keys.yaml"), text).tenants
    assert (operator.name, search.name, search.requests_per_minute, search.weight) == ("operator", "search", 600, 2.5)
    text = the(rendered["defaults"], "Secret", f"{NAME}-keys")["stringData"]["keys.yaml"]
    (only,) = parse_keys(Path("keys.yaml"), text).tenants
    assert (only.name, only.operator) == ("operator", True)


# --- generated files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_up_to_date(generate: ModuleType) -> None:
    assert (CHART / "values.schema.json").read_text() == generate.schema(), "run `make chart`"
    assert (CHART / "README.md").read_text() == generate.readme(), "run `make chart`"
    present = {path: path.read_bytes() for path in (CHART / "files").rglob("*") if path.suffix in (".yaml", ".json")}
    assert present == generate.copies(), "run `make chart`"


def test_every_value_is_documented(generate: ModuleType) -> None:
    documented = {line.split("`")[1] for line in generate.readme().splitlines() if line.startswith("| `")}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [path for path in leaves(values) if not covered(path, documented)] == []


def leaves(node: Any, *path: str) -> list[str]:
    if isinstance(node, dict) and node:
        return [leaf for key, value in node.items() for leaf in leaves(value, *path, key)]
    return [".".join(path)]


def covered(path: str, documented: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in documented for end in range(1, len(parts) + 1))


def test_the_schema_is_the_configurations_own() -> None:
    embedded = json.loads((CHART / "values.schema.json").read_text())["$defs"]["config"]
    assert embedded["properties"].keys() == Config.model_fields.keys()
    assert embedded["additionalProperties"] is False


def test_the_chart_is_packaged(tmp_path: Path) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("deepsplit-*.tgz")
    again = helm("template", "x", package)
    assert again.returncode == 0, again.stderr
