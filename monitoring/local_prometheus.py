"""A Prometheus on this machine that scrapes what a gateway's service discovery lists."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

RULES = Path(__file__).resolve().parent / "rules" / "deepsplit.yaml"
_HOST = "127.0.0.1"
_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.2
_LOG_LINES = 20


class ObserveError(Exception):
    """Prometheus cannot start or go on. The message names the fix."""


@dataclass(frozen=True)
class Discovery:
    """Where the gateway's service discovery is, with the key and authority to ask it."""

    url: str
    key_file: Path | None = None  # API key of a tenant with `operator: true`
    ca_file: Path | None = None  # authority of the gateway's certificate, if it is a private one


def prometheus_config(discovery: Discovery, rules: Path = RULES, interval: str = "5s") -> str:
    """Return the text of prometheus.yml; `interval` is how often it scrapes."""
    found: dict[str, object] = {"url": discovery.url, "refresh_interval": "5s"}
    if discovery.key_file is not None:
        # Prometheus 2.42 sends no type at all if it is not given, whatever its documentation says.
        found["authorization"] = {"type": "Bearer", "credentials_file": str(discovery.key_file.resolve())}
    if discovery.ca_file is not None:
        found["tls_config"] = {"ca_file": str(discovery.ca_file.resolve())}
    return yaml.safe_dump({
        "global": {"scrape_interval": interval, "scrape_timeout": interval},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "deepsplit", "http_sd_configs": [found]}],
    }, sort_keys=False)  # fmt: skip


def choose_port(wanted: int | None, usual: int) -> int:
    """Return the port `wanted`; without one, `usual` or else any free one. Raises ObserveError if `wanted` is taken."""
    for port in (usual, 0) if wanted is None else (wanted,):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    raise ObserveError(f"port {wanted} is taken: give another one, or none for any")


@contextlib.contextmanager
def prometheus(config: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run Prometheus with a folder of its own; both are gone afterwards. Raises ObserveError, also if it ends early."""
    command = shutil.which("prometheus")
    if command is None:
        raise ObserveError("prometheus is not installed: `apt-get install prometheus`, or put it on PATH")
    with tempfile.TemporaryDirectory(prefix="deepsplit-observe-") as folder:
        file, log = Path(folder, "prometheus.yml"), Path(folder, "log")
        file.write_text(config)
        flags = f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={_HOST}:{port}"
        with log.open("wb") as output:
            process = subprocess.Popen([command, *flags], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait_until_ready(process, port, log)
            yield process
            if process.poll() is not None:
                raise ObserveError(f"prometheus ended by itself:\n{_end_of(log)}")
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{_HOST}:{port}/-/ready", timeout=_STOP_S):
            return
        time.sleep(_POLL_S)
    raise ObserveError(f"prometheus did not start:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
