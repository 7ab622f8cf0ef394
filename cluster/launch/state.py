"""What is known of the running cluster: a file and a lock in a folder that only this user can read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.config import Config
from cluster.errors import StartupError


@dataclass(frozen=True)
class ClusterState:
    """One running cluster."""

    supervisor: int  # pid of the process that `down` asks to stop; 0 for an application on a joined cluster, detached
    supervisor_started: float  # its start time, to tell it from a later process with the same pid
    root: str  # folder with everything temporary, removed at the end
    session: int  # Unix session of the driver and of all that it started; 0 before there is a driver
    address: str  # of the Ray cluster (GCS); empty before it is known
    joined: bool  # the Ray cluster is not ours: only the application is
    ready: bool
    config: str  # Config as JSON

    def parsed_config(self) -> Config:
        """The configuration that the cluster runs."""
        return Config.model_validate_json(self.config)

    def supervisor_process(self) -> psutil.Process | None:
        """The live supervisor, or None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.supervisor)
            alive = process.status() != psutil.STATUS_ZOMBIE
            if self.supervisor and alive and abs(process.create_time() - self.supervisor_started) < 1:
                return process
        return None


class StateFolder:
    """Reads and writes the state of this user's one cluster. The lock is held for as long as a supervisor lives."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is XDG_RUNTIME_DIR/deepsplit, or deepsplit-UID in the temporary folder, if not given."""
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        default = Path(runtime) / "deepsplit" if runtime else Path(tempfile.gettempdir()) / f"deepsplit-{os.getuid()}"
        self.folder = folder or default
        self._file = self.folder / "cluster.json"
        self._lock: int | None = None

    def read(self) -> ClusterState | None:
        """The recorded cluster, alive or not."""
        try:
            return ClusterState(**json.loads(self._file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise StartupError(f"{self._file} is damaged ({error}): end the cluster by hand, then delete it") from error

    def write(self, state: ClusterState) -> None:
        """Replace the record."""
        self._make()
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(state)))
        partial.chmod(0o600)
        partial.replace(self._file)

    def clear(self) -> None:
        """Forget the cluster, and leave no folder behind."""
        self._file.unlink(missing_ok=True)
        self.unlock()
        (self.folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def lock(self) -> bool:
        """Become the one supervisor of this user; False if another process is."""
        self._make()
        path = self.folder / "lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have deleted the file: a lock on a file that is gone protects nothing.
            held = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
        except OSError:
            held = False
        if not held:
            os.close(handle)
            return False
        self._lock = handle
        return True

    def unlock(self) -> None:
        """Let go of the lock, if this process holds it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise StartupError(f"{self.folder} belongs to another user: set XDG_RUNTIME_DIR to a folder of your own")
