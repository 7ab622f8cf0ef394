"""Commands that need no cluster, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.keys.api_keys import key_hash
from cluster.keys.file import load_keys


def test_a_new_key_is_printed_once_and_its_hash_is_for_the_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["key", "new", "--tenant", "search"])
    assert done.exit_code == 0
    key = done.stdout.strip()
    assert key.startswith("ds-")
    assert key not in done.stderr
    assert f"  - name: search\n    keys: [{key_hash(key)}]\n" in done.stderr


def test_the_hash_and_never_the_key_goes_into_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = []
    for tenant in ("search", "chat", "search"):
        done = CliRunner().invoke(cli, ["key", "new", "--tenant", tenant, "--keys-file", str(file)])
        assert done.exit_code == 0
        keys.append(done.stdout.strip())
    assert {entry.name: set(entry.keys) for entry in load_keys(file).tenants} == {
        "search": {key_hash(keys[0]), key_hash(keys[2])}, "chat": {key_hash(keys[1])},
    }  # fmt: skip
    assert not any(key in file.read_text() for key in keys)


def test_a_file_that_cannot_be_added_to_is_left_to_the_user(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("tenants: [{name: search, keys: []}]\n")
    done = CliRunner().invoke(cli, ["key", "new", "--tenant", "chat", "--keys-file", str(file)])
    assert done.exit_code == 0
    assert "is not laid out so that a key can be added to it" in done.stderr
    assert key_hash(done.stdout.strip()) in done.stderr
    assert file.read_text() == "tenants: [{name: search, keys: []}]\n"


@pytest.mark.parametrize("name", ["", "a b", "-a", "ds-0123456789abcdef"])
def test_names_are_checked(name: str) -> None:
    done = CliRunner().invoke(cli, ["key", "new", "--tenant", name])
    assert done.exit_code == 2
    assert "--tenant" in done.stderr


@pytest.mark.parametrize("wanted", [["workers=2"], ["experts"], ["experts=0"], ["experts=-1"], ["experts=two"],
                                    ["experts=2", "experts=3"], ["=2"], ["experts.=2"],
                                    ["attention.a=2"], []])  # fmt: skip
def test_scale_says_what_it_takes(wanted: list[str]) -> None:
    done = CliRunner().invoke(cli, ["scale", *wanted])
    assert done.exit_code == 2
    assert "ROLE=NUMBER" in done.output


@pytest.mark.parametrize("command", [["scale", "experts=2"], ["restart", "experts"]])
def test_without_a_cluster_they_say_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 1
    assert "deepsplit up" in str(done.exception)
