"""The commands and names in docs/kubernetes.md are those that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.cli import Cli
from tests.helm.chart import CHART, ROOT, helm, pods, render
from tests.helm.test_config import NODES, model_of

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def commands(start: str) -> list[list[str]]:
    found = [shlex.split(line) for line in COMMANDS if line.startswith(start)]
    assert found, start
    return found


def test_helm_commands_render() -> None:
    """As `helm template` with the same options; there is no cluster to install to."""
    for command in commands("helm install") + commands("helm upgrade") + commands("helm template"):
        words = [str(ROOT / word) if word.startswith("helm/") else word for word in command[2:]]
        words = [word for word in words if word != "--create-namespace"]
        words = [str(CHART / "values-demo.yaml") if word == "my-values.yaml" else word for word in words]
        done = helm("template", *words)
        assert done.returncode == 0, (command, done.stderr)
    for command in commands("helm test") + commands("helm rollback"):
        done = helm(*command[1:], "--kubeconfig", "/nowhere")
        assert "unknown" not in done.stderr, (command, done.stderr)  # a flag or command that helm does not know
        assert "nreachable" in done.stderr or "no configuration" in done.stderr, done.stderr


def test_what_kubectl_asks_for_is_rendered() -> None:
    objects = render()
    names = {f"{o['kind'].lower()}/{o['metadata']['name'].replace('dsplit-deepsplit', 'deepsplit')}" for o in objects}
    labels = {f"{key}={value}" for pod in pods(objects) for key, value in pod.metadata["labels"].items()}
    for command in commands("kubectl") + commands("KEY=$("):
        text = " ".join(command)
        for kind, name in re.findall(r"\b(secret|configmap|service)[ /](deepsplit[\w-]*)", text):
            assert f"{kind}/{name}" in names, text
        for selector in re.findall(r"--selector (\S+)", text):
            assert selector in labels, text
    for name in re.findall(r"`(deepsplit-[\w-]+)`", PAGE):
        known = {name.partition("/")[2] for name in names} | {"deepsplit-serve-svc"}  # KubeRay's own
        assert name in known, name


def test_images_are_built_from_targets_that_there_are() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for command in commands("docker build"):
        target, tag = command[command.index("--target") + 1], command[command.index("-t") + 1]
        assert f" AS {target}\n" in dockerfile
        assert tag.removeprefix("REGISTRY/") == pods(render())[0].containers[0]["image"].replace("-cpu", f"-{target}")
        for argument in re.findall(r"--build-arg (\w+)=", " ".join(command)):
            assert f"ARG {argument}=" in dockerfile


def test_values_that_are_named_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    roots = values.keys() - {"config", "global"}
    named = [path for path in re.findall(r"`([a-z]\w+(?:\.\w+)+)`", PAGE) if path.split(".")[0] in roots]
    assert len(named) > 20
    for path in named:
        node = values
        for key in path.replace("NAME", "cpu").split("."):
            assert key == "share" or key in node, path
            node = node.get(key)


@pytest.mark.parametrize("profile", ["deepseek-v3-hybrid"])
def test_validate_and_plan_take_the_config_maps_file(profile: str, tmp_path: Path, demo_model: Path) -> None:
    done = helm("template", "deepsplit", CHART, "--values", CHART / f"values-{profile}.yaml", "--show-only",
                "templates/config.yaml")  # fmt: skip
    config = yaml.safe_load(yaml.safe_load(done.stdout)["data"]["deepsplit.yaml"])
    config["model"]["path"] = str(model_of(profile, demo_model))
    cli = Cli(tmp_path, tmp_path)
    path, nodes = cli.write_config(config), tmp_path / "nodes.yaml"
    nodes.write_text(yaml.safe_dump(NODES[profile]))
    assert cli.run("validate", path).returncode == 0
    plan = cli.run("plan", path, "--nodes", nodes)
    assert plan.returncode == 0, plan.stderr
    for said in ("309.75 GiB", "2.68 GiB each", "4.29 MiB out"):  # the table of sizes
        assert said in plan.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
