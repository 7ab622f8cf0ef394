"""Keys to tenants: nobody unknown gets in, and a file that changes is followed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError, Unauthenticated
from cluster.keys.api_keys import key_hash, new_key
from cluster.tls.reloading import at_once
from routing.requests.request import Priority, Tenant
from routing.requests.tenants import Tenants, TenantsFile

KEYS = [new_key() for _ in range(3)]


def write(path: Path, *names: str, extra: str = "") -> Path:
    """One tenant for each name, with the key of the same position."""
    lines = [f"  - name: {name}\n    keys: [{key_hash(key)}]\n{extra}" for name, key in zip(names, KEYS, strict=False)]
    path.write_text("tenants:\n" + "".join(lines))
    return path


def test_each_key_is_its_tenant(tmp_path: Path) -> None:
    tenants = Tenants.load(write(tmp_path / "keys.yaml", "a", "b", "c"))
    assert [tenants.identify(key).name for key in KEYS] == ["a", "b", "c"]


def test_a_tenant_has_what_the_file_says(tmp_path: Path) -> None:
    extra = """\
    classes: [batch, system]
    default_class: batch
    models: [demo]
    weight: 0.5
    requests_per_minute: 1
    tokens_per_minute: 2
    max_streams: 3
"""
    tenants = Tenants.load(write(tmp_path / "keys.yaml", "a", extra=extra))
    assert tenants.identify(KEYS[0]) == Tenant(
        "a", (Priority.SYSTEM, Priority.BATCH), Priority.BATCH, ("demo",), 0.5, 1, 2, 3
    )
    assert Tenants.load(write(tmp_path / "keys.yaml", "a")).identify(KEYS[0]) == Tenant("a")


@pytest.mark.parametrize("key", ["", None])
def test_no_key_is_told_how_to_send_one(tmp_path: Path, key: str | None) -> None:
    tenants = Tenants.load(write(tmp_path / "keys.yaml", "a"))
    with pytest.raises(Unauthenticated, match=r"no API key: send it as `Authorization: Bearer KEY` .*metadata"):
        tenants.identify(key)


@pytest.mark.parametrize(
    "key", [KEYS[1], KEYS[0][:-1], KEYS[0] + "x", KEYS[0].upper(), key_hash(KEYS[0]), "x" * 100_000, "\udcff"]
)
def test_other_keys_are_unknown_and_not_repeated(tmp_path: Path, key: str) -> None:
    tenants = Tenants.load(write(tmp_path / "keys.yaml", "a"))
    with pytest.raises(Unauthenticated, match="not known here") as caught:
        tenants.identify(key)
    assert key not in str(caught.value)


def test_without_a_file_everybody_is_anonymous_and_unlimited() -> None:
    file = TenantsFile(None)
    for key in (None, KEYS[0]):
        tenant = file.current().identify(key)
        assert tenant.name == "anonymous"
        assert tenant.classes == tuple(Priority)
        assert tenant.default_class is Priority.INTERACTIVE
        assert (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_streams) == (None, None, None)


def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the keys file"):
        TenantsFile(tmp_path / "keys.yaml")


def test_a_changed_file_is_followed(tmp_path: Path) -> None:
    file = TenantsFile(write(tmp_path / "keys.yaml", "a"), at_once)
    with pytest.raises(Unauthenticated):
        file.current().identify(KEYS[1])
    write(tmp_path / "keys.yaml", "a", "b")
    assert file.current().identify(KEYS[1]).name == "b"
    (tmp_path / "keys.yaml").unlink()
    write(tmp_path / "keys.yaml", "renamed")
    assert file.current().identify(KEYS[0]).name == "renamed"
    with pytest.raises(Unauthenticated):
        file.current().identify(KEYS[1])


def test_a_broken_or_deleted_file_leaves_the_tenants_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.yaml", "a")
    file = TenantsFile(path, at_once)
    with caplog.at_level(logging.INFO):
        path.write_text(f"tenants:\n  - name: a\n    keys: [{KEYS[2]}]\n    max_stream: {key_hash(KEYS[1])}\n")
        for _ in range(3):
            assert file.current().identify(KEYS[0]).name == "a"
        assert len(caplog.messages) == 1
        assert "line 3: tenants[0].keys[0]: is a key" in caplog.text
        path.unlink()
        for _ in range(3):
            assert file.current().identify(KEYS[0]).name == "a"
        assert len(caplog.messages) == 2
        write(path, "a", "b", "c")
        file.current().identify(KEYS[2])
    for key in KEYS:
        assert key not in caplog.text
        assert key_hash(key)[7:] not in caplog.text


def test_a_thousand_tenants_are_read_beside_the_event_loop(tmp_path: Path) -> None:
    keys, path = [new_key() for _ in range(1000)], tmp_path / "keys.yaml"

    def write_all(prefix: str) -> None:
        lines = [f"  - name: {prefix}{n}\n    keys: [{key_hash(key)}]\n" for n, key in enumerate(keys)]
        path.write_text("tenants:\n" + "".join(lines))

    write_all("t")
    work: list[Callable[[], None]] = []
    file = TenantsFile(path, work.append)
    before = file.current()
    assert [before.identify(key).name for key in keys[::100]] == [f"t{n}" for n in range(0, 1000, 100)]
    write_all("renamed")
    assert all(file.current() is before for _ in range(10))  # nothing was read: the reading waits in `work`
    (read,) = work
    read()
    assert file.current().identify(keys[999]).name == "renamed999"


def test_a_changed_file_is_soon_in_force(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.yaml", "a")
    file = TenantsFile(path)
    write(path, "renamed")
    until = time.monotonic() + 30
    while file.current().identify(KEYS[0]).name != "renamed":
        assert time.monotonic() < until
        time.sleep(0.001)
