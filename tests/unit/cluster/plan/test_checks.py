"""Keys and certificates are looked at before anything starts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.errors import ConfigError, StartupError
from cluster.keys.api_keys import key_hash
from cluster.plan.checks import check_files
from tests.certificates import Authority, public


def config(folder: Path, address: str | None = None) -> Config:
    tls = Authority("ours").issue(folder)
    (folder / "keys.yaml").write_text(f"tenants:\n  - name: t\n    keys: [{key_hash('a')}, {key_hash('b')}]\n")
    sections = {
        "model": {"path": folder}, "ray": {"address": address}, "internal_tls": tls,
        "gateway": {"keys_file": folder / "keys.yaml", "tls": public(tls)},
    }  # fmt: skip
    return Config.model_validate(sections)


def test_what_is_in_order_is_said(tmp_path: Path) -> None:
    assert list(check_files(config(tmp_path), time.time())) == [
        "keys: 2 key(s) of 1 tenant(s)",
        "gateway.tls: certificate and key fit, valid for 1.0 more days",
        "internal_tls: certificate and key fit, valid for 1.0 more days",
    ]
    assert list(check_files(Config.model_validate({"model": {"path": tmp_path}}), time.time())) == []


def test_faults_are_errors(tmp_path: Path) -> None:
    made = config(tmp_path)
    with pytest.raises(StartupError, match=r"gateway\.tls\.cert_file \S+ expired"):
        list(check_files(made, time.time() + 2 * 86400))
    (tmp_path / "tls.key").unlink()
    with pytest.raises(StartupError, match=r"cannot read gateway\.tls\.key_file"):
        list(check_files(made, time.time()))
    (tmp_path / "keys.yaml").unlink()
    with pytest.raises(ConfigError, match="cannot read the keys file"):
        list(check_files(made, time.time()))


def test_on_a_joined_cluster_files_may_be_elsewhere(tmp_path: Path) -> None:
    made = config(tmp_path, address="head:6379")
    (tmp_path / "keys.yaml").unlink()
    (tmp_path / "tls.crt").unlink()
    lines = list(check_files(made, time.time()))
    assert [line.split(" ", 1)[0] for line in lines] == ["keys:", "gateway.tls:", "internal_tls:"]
    assert all(line.endswith("is not here, not checked") for line in lines)
