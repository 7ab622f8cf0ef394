"""Files that are read again when they change, such as certificates and keys that a secret store rotates."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from cluster.errors import DeepsplitError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Signature = tuple[tuple[int, int, int], ...]  # per file: inode, mtime in ns, size


def at_once(work: Callable[[], None]) -> None:
    """Runs `work` before it returns: whoever asks for the content waits for it."""
    work()


def in_thread(work: Callable[[], None]) -> None:
    """Runs `work` beside the caller, such as an event loop that must not wait for a long file to be read."""
    threading.Thread(target=work, name="reload", daemon=True).start()


class ReloadedFiles(Generic[_T]):
    """What `load` makes of `paths`, and makes again once one of them changed. Thread-safe.

    A `stat` per file and look (about 2 us) is all that watching costs. `stat` follows links, so Kubernetes' way of
    replacing a mounted secret (a link to a new folder) is a change like any other.
    """

    def __init__(
        self, paths: Sequence[Path], load: Callable[[], _T], run: Callable[[Callable[[], None]], None] = at_once
    ) -> None:
        """Loads once, before it returns; raises what `load` raises. `run` runs all later loading, one at a time."""
        self._paths = tuple(paths)
        self._load = load
        self._run = run
        self._lock = threading.Lock()
        self._loading = False
        self._seen = self._signature()
        self._value = load()

    def current(self) -> _T:
        """The newest usable content. Files that are gone, half-written or do not fit together keep the old content in
        force, with one warning for each such state; so does a change that is being read `in_thread`.
        """
        with self._lock:
            if not self._loading and (found := self._signature()) != self._seen:
                self._seen = found  # taken before the files are read, so a change meanwhile is seen next time
                self._loading = True
                self._run(self._reload)
            return self._value

    def _reload(self) -> None:
        try:
            self._value = self._load()
            logger.info("read again: %s", self._names())
        except DeepsplitError as error:
            logger.warning("the former content of %s stays in force: %s", self._names(), error)
        finally:
            self._loading = False

    def _signature(self) -> _Signature | None:
        try:
            stats = [path.stat() for path in self._paths]
        except OSError:
            return None
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))
