"""Files are read again when they change, and only usable content takes effect."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.tls.reloading import ReloadedFiles
from tests.certificates import MountedSecret


def number(path: Path) -> ReloadedFiles[int]:
    def load() -> int:
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"not a number: {error}") from None

    return ReloadedFiles((path,), load)


def test_unusable_at_start_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a number"):
        number(tmp_path / "n")


def test_changes_in_place_and_by_replacement_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    files = number(path)
    assert files.current() == 1
    path.write_text("22")
    assert files.current() == 22
    (tmp_path / "new").write_text("33")
    (tmp_path / "new").replace(path)
    assert files.current() == 33


def test_a_mounted_secret_that_is_swapped_is_seen(tmp_path: Path) -> None:
    secret = MountedSecret(tmp_path / "secret")
    secret.replace({"n": b"1"})
    files = number(secret.folder / "n")
    secret.replace({"n": b"2"})
    assert files.current() == 2


def test_unusable_and_missing_files_keep_the_former_with_one_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "n"
    path.write_text("1")
    files = number(path)
    with caplog.at_level(logging.WARNING):
        path.write_text("half")
        assert [files.current() for _ in range(3)] == [1, 1, 1]
        assert len(caplog.messages) == 1
        assert f"the former content of {path} stays in force: not a number" in caplog.messages[0]
        path.unlink()
        assert [files.current() for _ in range(3)] == [1, 1, 1]
        assert len(caplog.messages) == 2
    path.write_text("4")
    assert files.current() == 4
