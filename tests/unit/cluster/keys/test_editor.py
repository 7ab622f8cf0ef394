"""A key is added where it belongs and everything else stays as it was written."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.keys.api_keys import key_hash
from cluster.keys.editor import add_key
from cluster.keys.file import load_keys

A, B, NEW = key_hash("a"), key_hash("b"), key_hash("new")


def added(path: Path, text: str, tenant: str) -> str:
    path.write_text(text)
    assert add_key(path, tenant, NEW)
    assert NEW in next(entry for entry in load_keys(path).tenants if entry.name == tenant).keys
    return path.read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_file_that_is_not_there_is_made_for_its_owner_only(path: Path) -> None:
    assert add_key(path, "t", NEW)
    assert path.read_text() == f"tenants:\n  - name: t\n    keys: [{NEW}]\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.yaml"]


def test_a_file_of_comments_only_keeps_them(path: Path) -> None:
    assert added(path, "# ours", "t") == f"# ours\ntenants:\n  - name: t\n    keys: [{NEW}]\n"


def test_a_tenants_key_is_added_to_its_list(path: Path) -> None:
    text = f"""\
# ours
tenants:
  - name: s   # search
    keys: [{A}]  # 2026
    weight: 2.0

  - name: u
    keys:
      # first
      - {B}  # laptop
    # limits follow
    max_streams: 3
# end
"""
    assert added(path, text, "s") == text.replace(f"[{A}]", f"[{NEW}, {A}]")
    assert added(path, text, "u") == text.replace("# laptop\n", f"# laptop\n      - {NEW}\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert added(path, text, "v") == text.replace("# end", f"  - name: v\n    keys: [{NEW}]\n# end")


S_ALONE = "tenants:\n- {name: s, keys: []}\n"


@pytest.mark.parametrize(
    ("text", "tenant", "expected"),
    [
        (S_ALONE[:-1], "v", f"{S_ALONE}- name: v\n  keys: [{NEW}]\n"),
        (S_ALONE, "s", S_ALONE.replace("[]", f"[{NEW}]")),
        (S_ALONE, "123", f'{S_ALONE}- name: "123"\n  keys: [{NEW}]\n'),
    ],
)  # fmt: skip
def test_other_layouts(path: Path, text: str, tenant: str, expected: str) -> None:
    assert added(path, text, tenant) == expected


@pytest.mark.parametrize(
    ("text", "tenant"),
    [
        (f"tenants: [{{name: s, keys: [{A}]}}]\n", "v"),
        (f"tenants:\n  - name: s\n    keys: &mine [{A}]\n", "s"),
    ],
    ids=["flow style", "anchor"],
)
def test_what_cannot_be_added_to_is_left_alone(path: Path, text: str, tenant: str) -> None:
    path.write_text(text)
    assert not add_key(path, tenant, NEW)
    assert path.read_text() == text


def test_a_file_with_faults_is_left_alone(path: Path) -> None:
    path.write_text("tenants:\n  - name: s\n    key: []\n")
    with pytest.raises(ConfigError, match=r"line 3: tenants\[0\].key: unknown key"):
        add_key(path, "s", NEW)


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text(f"tenants:\n  - name: s\n    keys: [{A}]\n")
    path.symlink_to(real)
    assert add_key(path, "s", NEW)
    assert path.is_symlink()
    assert NEW in real.read_text()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the keys file .*/no/keys.yaml: No such file"):
        add_key(tmp_path / "no" / "keys.yaml", "s", NEW)
