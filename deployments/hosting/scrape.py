"""Opens a process's scrape target where the configuration says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from cluster.addresses import bracketed
from cluster.config import Config
from cluster.errors import StartupError
from cluster.tls.certificates import expires_at_s
from monitoring.discovery import Role, ScrapeTarget
from monitoring.exporter import ProcessRegistry, start_exporter
from monitoring.metrics import ProcessMetrics

_ANY_ADDRESS = ("0.0.0.0", "::")


class ProcessScrape:
    """A scrape target that listens from its construction on. Raises StartupError."""

    def __init__(
        self,
        registry: ProcessRegistry,
        role: Role,
        worker: str,
        node: str,
        host: str,
        first_port: int,
        certificates: Mapping[str, Path],
    ) -> None:
        """`certificates`: the certificates that this process presents, by section of the configuration."""
        metrics = ProcessMetrics(registry)
        metrics.info.info({"version": version("deepsplit")})
        registry.before_scrape(lambda: _update_expiry(certificates, metrics))
        try:
            self._exporter = start_exporter(registry, host, first_port)
        except OSError as error:
            raise StartupError(
                f"no port for metrics on {host}: {error.strerror or error}; see monitoring.host and monitoring.port"
            ) from error
        port = self._exporter.port
        shown = node if host in _ANY_ADDRESS else host
        self.target = ScrapeTarget(role, f"{bracketed(shown)}:{port}", node, worker)

    def stop(self) -> None:
        """Close the port."""
        self._exporter.stop()


def scrape_process(registry: ProcessRegistry, role: Role, worker: str, node: str, config: Config) -> ProcessScrape:
    """Open the scrape target of a process that has the whole configuration. Raises StartupError."""
    certificates: dict[str, Path] = {}
    if config.internal_tls is not None and role != "directory":  # which has no port of its own
        certificates["internal_tls"] = config.internal_tls.cert_file
    if role == "gateway" and config.gateway.tls is not None:
        certificates["gateway.tls"] = config.gateway.tls.cert_file
    host = config.monitoring.host or config.own_host(node)
    return ProcessScrape(registry, role, worker, node, host, config.monitoring.port, certificates)


def write_scrape_file(file: Path, target: ScrapeTarget) -> None:
    """Write where an engine's process listens, for its replica: the process has no connection to Ray."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(target)))
    partial.replace(file)


def read_scrape_file(file: Path) -> ScrapeTarget | None:
    """Return where the engine's process listens; None while it has not written that."""
    try:
        return ScrapeTarget(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None


def _update_expiry(certificates: Mapping[str, Path], metrics: ProcessMetrics) -> None:
    for section, file in certificates.items():
        # A file that is half-written or gone keeps its last value: whoever serves with it reports it.
        with contextlib.suppress(StartupError):
            metrics.certificate_expiry.labels(section).set(expires_at_s(file))
