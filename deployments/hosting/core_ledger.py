"""Which cores of this host are taken: one file per core in a folder, locked by the process that has the core.

The kernel drops a lock when its holder ends, however it ends, so there is no daemon and no claim outlives its process.
Only locks count; the files stay. Processes that share no folder (pods) share no cores either, or have a CPU quota.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

_TURN_TIMEOUT_S = 2.0  # one turn takes about a millisecond; a holder that was stopped must not stop us
_TURN_RETRY_S = 0.01


class CoreLedger:
    """One process's view of the ledger, and the claims that it holds until `release` or its end. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if the folder cannot be made or written."""
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._turn = self._open("turn")  # held while the ledger is read or changed
        self._unpinned = self._open("unpinned")  # held, shared, by compute processes that may run on every core
        self._held: dict[int, int] = {}  # open files by core

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores that this process has claimed."""
        return tuple(sorted(self._held))

    def claim(
        self, cores: Iterable[int], choose: Callable[[Collection[int]], tuple[int, ...] | None]
    ) -> tuple[int, ...] | None:
        """Take those that `choose` picks of the free ones among `cores`. Returns None if it picks none, or the ledger
        is stuck.
        """
        assert not self._held, "a process claims once"
        with self._my_turn() as mine:
            if not mine:
                return None
            for core in cores:
                file = self._open(f"core-{core}")
                if _lock(file, fcntl.LOCK_EX):
                    self._held[core] = file
                else:
                    os.close(file)
            chosen = choose(self._held)
            for core in set(self._held) - set(chosen or ()):
                os.close(self._held.pop(core))
            return chosen

    def release(self) -> None:
        """Give the cores back."""
        for core in self.cores:
            os.close(self._held.pop(core))

    def say_unpinned(self, unpinned: bool) -> None:
        """Tell the others that this process computes on every core, or does no more."""
        fcntl.flock(self._unpinned, fcntl.LOCK_UN)
        if unpinned:
            with self._my_turn():  # nobody looks meanwhile
                _lock(self._unpinned, fcntl.LOCK_SH)

    def crowded(self) -> bool:
        """Whether another process computes on every core, those of this one included. To be asked by one that does not.
        """
        with self._my_turn() as mine:
            free = mine and _lock(self._unpinned, fcntl.LOCK_EX)
            if free:
                fcntl.flock(self._unpinned, fcntl.LOCK_UN)
            return mine and not free

    def close(self) -> None:
        """Release everything."""
        self.release()
        os.close(self._turn)
        os.close(self._unpinned)

    def _open(self, name: str) -> int:
        return os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def _my_turn(self) -> Iterator[bool]:
        deadline = time.monotonic() + _TURN_TIMEOUT_S
        mine = _lock(self._turn, fcntl.LOCK_EX)
        while not mine and time.monotonic() < deadline:
            time.sleep(_TURN_RETRY_S)
            mine = _lock(self._turn, fcntl.LOCK_EX)
        try:
            yield mine
        finally:
            if mine:
                fcntl.flock(self._turn, fcntl.LOCK_UN)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
