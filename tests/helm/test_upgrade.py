"""One version over another: generated secrets are kept, names and selectors stay, what cannot be changed is not."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import InternalTlsConfig, ServerTls
from cluster.tls.certificates import load_internal, load_public
from tests.helm.chart import (
    CHART,
    NAME,
    NAMESPACE,
    RELEASE,
    Manifest,
    helm,
    of_kind,
    render,
    the,
)
from tests.helm.fake_api import FakeApi
from tests.helm.identity import identity
from tests.helm.matrix import MATRIX

INSTALLED = Path(__file__).parent / "installed"
DAY_S = 86400.0


def secrets(objects: list[Manifest]) -> dict[str, dict[str, str]]:
    return {o["metadata"]["name"]: o.get("data", {}) | o.get("stringData", {}) for o in of_kind(objects, "Secret")}


def upgraded(before: list[Manifest], folder: Path, values: dict[str, Any] | None = None) -> list[Manifest]:
    """The next version of the chart, rendered where `before` is installed."""
    chart = folder / "deepsplit"
    shutil.copytree(CHART, chart, dirs_exist_ok=True)
    meta = yaml.safe_load((chart / "Chart.yaml").read_text()) | {"version": "9.9.9", "appVersion": "9.9.9"}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(meta))
    with FakeApi(before, folder) as api:
        done = helm(
            "template", RELEASE, chart, "--namespace", NAMESPACE, *api.options, "--values", "-",
            stdin=json.dumps(values or {}),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not set(secrets(before)) - set(api.asked) - {f"{NAME}-keys"}
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def test_generated_secrets_are_kept(tmp_path: Path) -> None:
    before = render()
    after = upgraded(before, tmp_path)
    assert secrets(after) == secrets(before)
    assert "9.9.9-cpu" in str(the(after, "RayService"))


def test_a_new_tenant_leaves_the_operators_key_alone(tmp_path: Path) -> None:
    before = render()
    tenant = {"name": "search", "keys": ["sha256:" + "1" * 64]}
    after = upgraded(before, tmp_path, {"auth": {"tenants": [tenant]}})
    kept, changed = secrets(before), secrets(after)
    assert changed[f"{NAME}-operator-key"] == kept[f"{NAME}-operator-key"]
    was, now = (yaml.safe_load(found[f"{NAME}-keys"]["keys.yaml"])["tenants"] for found in (kept, changed))
    assert now == [*was, tenant]


def test_a_secret_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    before = render()
    left = [o for o in before if o["metadata"]["name"] != f"{NAME}-internal-tls"]
    after = upgraded(left, tmp_path)
    assert secrets(after)[f"{NAME}-internal-tls"] != secrets(before)[f"{NAME}-internal-tls"]
    assert secrets(after)[f"{NAME}-tls"] == secrets(before)[f"{NAME}-tls"]


def test_a_first_install_finds_nothing_and_makes_everything(tmp_path: Path) -> None:
    assert secrets(upgraded([], tmp_path)).keys() == secrets(render()).keys()


@pytest.mark.parametrize("release", sorted(path.stem for path in INSTALLED.glob("*.json")))
def test_names_selectors_and_immutable_fields_are_those_of(release: str, rendered: dict[str, list[Manifest]]) -> None:
    for row, was in json.loads((INSTALLED / f"{release}.json").read_text()).items():
        assert row in MATRIX, f"the matrix has lost {row}, which {release} could be installed with"
        now = identity(rendered[row])
        assert {key: now.get(key) for key in was} == was, row


def test_generated_certificates_are_what_deepsplit_wants(tmp_path: Path, rendered: dict[str, list[Manifest]]) -> None:
    found = secrets(rendered["more names"])
    for name in (f"{NAME}-tls", f"{NAME}-internal-tls"):
        for key, value in found[name].items():
            (tmp_path / f"{name}-{key}").write_bytes(base64.b64decode(value))
    from time import time

    tls = tmp_path / f"{NAME}-tls-tls.crt"
    public = load_public(ServerTls(cert_file=tls, key_file=tmp_path / f"{NAME}-tls-tls.key"), time())
    assert public.names >= {NAME, f"{NAME}.{NAMESPACE}.svc", "llm.example.org"}
    assert public.not_after_s - time() > 3600 * DAY_S
    paths = {f"{part}_file": tmp_path / f"{NAME}-internal-tls-{file}"
             for part, file in (("cert", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt"))}  # fmt: skip
    assert load_internal(InternalTlsConfig(**paths), time()).pair.names == {"deepsplit"}
