"""What a test module leaves behind: child processes, and temporary directories of ours, of Ray's or of vLLM's."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

_PATTERNS = ("tmp/ray/session_*", "tmp/deepsplit*", "tmp/dsplit*", "dev/shm/deepsplit*", "dev/shm/dsplit*")


class Leftovers:
    """Remembers what is there when it is made; `left` then names what has come since and stays.

    Directories that a living process works with are not counted: they belong to whoever runs beside the tests, or to a
    child process, which is counted itself.
    """

    def __init__(self) -> None:
        self._children, self._folders = _children(), _folders()

    def left(self, wait_s: float) -> list[str]:
        """One line per leftover, or none as soon as there is none; waits up to `wait_s` for a clean end."""
        deadline = time.monotonic() + wait_s
        while True:
            processes = [_describe(child) for child in _children() - self._children]
            folders = [f"directory {folder}" for folder in _folders() - self._folders if not _in_use(folder)]
            if not processes + folders or time.monotonic() > deadline:
                return sorted(processes + folders)
            time.sleep(0.1)


def _children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children(recursive=True) if _alive(child)}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _folders() -> set[Path]:
    return {path for pattern in _PATTERNS for path in Path("/").glob(pattern)}


def _in_use(folder: Path) -> bool:
    text = str(folder)
    return any(
        text in argument for process in psutil.process_iter(["cmdline"]) for argument in process.info["cmdline"] or ()
    )


def _describe(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"process {process.pid}, which has just ended"
