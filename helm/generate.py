"""Makes the generated files of the chart, `python helm/generate.py` (`make chart` runs it); tests hold them up to date.

deepsplit/values.schema.json from values.schema.yaml, deepsplit's configuration tree and the keys file's entries,
deepsplit/README.md from the comments in values.yaml, deepsplit/files/ from monitoring/rules and monitoring/dashboards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from cluster.config import Config
from cluster.keys.file import TenantEntry

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "deepsplit"
_COPIED = {"rules": "*.yaml", "dashboards": "*.json"}

_README_HEAD = """# deepsplit on Kubernetes

Generated from `values.yaml` by `make chart`; do not edit. How to install, upgrade and operate: `docs/kubernetes.md`.

```
helm install deepsplit helm/deepsplit --namespace deepsplit --create-namespace -f helm/deepsplit/values-demo.yaml
helm test deepsplit --namespace deepsplit
```

Needs Kubernetes 1.30 or newer and the KubeRay operator 1.6 or newer. Ready-made profiles beside this file:

| file | what it runs |
|---|---|
| `values-demo.yaml` | the demo model on CPUs, on one machine of 16 GiB |
| `values-deepseek-v3-gpu.yaml` | DeepSeek-V3, attention and experts on GPUs |
| `values-deepseek-v3-hybrid.yaml` | DeepSeek-V3, attention on GPUs and experts on CPU hosts |

## Values

| value | default | meaning |
|---|---|---|
"""


def schema() -> str:
    """The text of values.schema.json."""
    made = yaml.safe_load((ROOT / "helm" / "values.schema.yaml").read_text())
    made = _inlined(made, made)
    made["$defs"]["config"] = _moved(Config, "config")
    made["$defs"]["tenant"] = _moved(TenantEntry, "tenant")
    return json.dumps(made, indent=1) + "\n"


def _inlined(node: Any, whole: Mapping[str, Any]) -> Any:
    """`$ref` inside `properties` stands for the properties that it points to: draft 7 cannot extend a closed object."""
    if isinstance(node, list):
        return [_inlined(item, whole) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _inlined(value, whole) for key, value in node.items()}
    properties = made.get("properties")
    if isinstance(properties, dict) and isinstance(properties.get("$ref"), str):
        target: Any = whole
        for part in properties.pop("$ref").removeprefix("#/").split("/"):
            target = target[part]
        properties.update(_inlined(target, whole))
    return made


def _moved(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The model's schema as it is below `$defs/NAME`. Helm shows its messages, so no descriptions are needed."""
    text = json.dumps(model.model_json_schema()).replace('"#/$defs/', f'"#/$defs/{name}/$defs/')
    moved: dict[str, Any] = _without_notes(json.loads(text))
    return moved


def _without_notes(node: Any, named: bool = False) -> Any:
    """Without titles, descriptions, defaults and formats; `named`: the keys of `node` are names of properties."""
    if isinstance(node, list):
        return [_without_notes(item) for item in node]
    if not isinstance(node, dict):
        return node
    dropped = set() if named else {"title", "description", "default", "format"}
    return {
        key: _without_notes(value, named=key in ("properties", "$defs") and not named)
        for key, value in node.items()
        if key not in dropped
    }


def readme() -> str:
    """The text of the chart's README."""
    return _README_HEAD + "".join(_rows()) + _README_TAIL


_README_TAIL = """
A group of `experts.groups` also takes what `attention` takes: `nodeSelector`, `tolerations`, `affinity`,
`priorityClassName`, `runtimeClassName`, `podLabels`, `podAnnotations`, `env`, `volumes`, `volumeMounts`, `scratchSize`
and `shmSize`.
"""


def _rows() -> Iterator[str]:
    text = (CHART / "values.yaml").read_text()
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("# ") and comment:
            comment.append(stripped.removeprefix("# "))
        elif match := re.match(r"( *)([\w./-]+):", line):
            path[len(match[1]) // 2 :] = [match[2]]
            if comment:
                dotted = ".".join(path)
                cells = (f"`{dotted}`", f"`{json.dumps(_value(text, path))}`", " ".join(comment))
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
            comment = []
        else:
            comment = []


def _value(text: str, path: list[str]) -> object:
    value = yaml.safe_load(text)
    for key in path:
        value = value[key]
    return value


def copies() -> dict[Path, bytes]:
    """What belongs into the chart's files/, by path."""
    made = {}
    for folder, pattern in _COPIED.items():
        for source in sorted((ROOT / "monitoring" / folder).glob(pattern)):
            made[CHART / "files" / folder / source.name] = source.read_bytes()
    return made


def main() -> None:
    """Write everything; files whose source is gone go too."""
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(readme())
    wanted = copies()
    for folder in _COPIED:
        for present in (CHART / "files" / folder).glob("*"):
            if present not in wanted:
                present.unlink()
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


if __name__ == "__main__":
    main()
