"""Files are read again when they change, and only usable content takes effect."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.tls.reloading import ReloadedFiles, in_thread
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


def test_a_change_that_is_read_elsewhere_leaves_the_former_in_force_until_then(tmp_path: Path) -> None:
    path, work, loads = tmp_path / "n", list[Callable[[], None]](), list[str]()

    def load() -> int:
        loads.append(path.read_text())
        return int(loads[-1])

    path.write_text("1")
    files = ReloadedFiles((path,), load, work.append)
    path.write_text("22")
    assert [files.current() for _ in range(3)] == [1, 1, 1]
    assert (len(work), loads) == (1, ["1"])
    path.write_text("333")  # while the former change waits to be read
    assert (files.current(), len(work)) == (1, 1)
    work.pop()()
    assert files.current() == 333
    for again in work:  # the second change was read with the first, which nobody knew
        again()
    assert (files.current(), loads[:2]) == (333, ["1", "333"])


def test_a_failure_elsewhere_keeps_the_former_and_the_next_change_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, work = tmp_path / "n", list[Callable[[], None]]()

    def load() -> int:
        if (text := path.read_text()) == "half":
            raise ConfigError("not a number")
        return int(text)

    path.write_text("1")
    files = ReloadedFiles((path,), load, work.append)
    path.write_text("half")
    files.current()
    work.pop()()
    assert [files.current() for _ in range(3)] == [1, 1, 1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not work
    path.write_text("x")
    files.current()
    with pytest.raises(ValueError, match="invalid literal"):  # a mistake of ours, which must not stop all reloading
        work.pop()()
    path.write_text("4")
    files.current()
    work.pop()()
    assert files.current() == 4


def test_a_thread_reads_while_others_go_on(tmp_path: Path) -> None:
    path, go_on, first = tmp_path / "n", threading.Event(), threading.current_thread()

    def load() -> int:
        assert threading.current_thread() is first or go_on.wait(30)
        return int(path.read_text())

    path.write_text("1")
    files = ReloadedFiles((path,), load, in_thread)
    path.write_text("22")
    assert [files.current() for _ in range(3)] == [1, 1, 1]  # returns although the loading has not
    go_on.set()
    until = time.monotonic() + 30
    while files.current() != 22:
        assert time.monotonic() < until
        time.sleep(0.001)
