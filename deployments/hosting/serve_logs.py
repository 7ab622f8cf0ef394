"""Sets up the logging of a Serve replica and of the processes that it starts, as the configuration asks."""

from __future__ import annotations

import json
from logging.handlers import RotatingFileHandler
from pathlib import Path

import ray
from ray import serve

from cluster.config import LoggingConfig
from monitoring.logs import Process, child_config, take_over_serve


def start_logging(settings: LoggingConfig, role: str, worker_id: str | None = None) -> RotatingFileHandler:
    """Set up a replica's logging, first thing in its constructor. Returns the handler of its log file."""
    return take_over_serve(settings.format, settings.level, _process(role, worker_id))


class EngineLogging:
    """How the processes that vLLM starts log: a file that each of them reads, for `logging.config.dictConfig`.

    The replica's own process reads it too, as soon as vLLM has the engine's configuration. It logs already, so until
    `write_for_children` the file says that nothing is to change.
    """

    def __init__(self, settings: LoggingConfig, beside: RotatingFileHandler, path: Path) -> None:
        self._path = path
        self._config = child_config(settings.format, settings.level, _process("engine"), beside)
        self._path.write_text(json.dumps({"version": 1, "incremental": True}))

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment that makes vLLM read the file."""
        return {"VLLM_LOGGING_CONFIG_PATH": str(self._path)}

    def write_for_children(self) -> None:
        """From here on the file is for the processes that are about to start."""
        self._path.write_text(json.dumps(self._config))


def _process(role: str, worker_id: str | None = None) -> Process:
    replica_id = serve.get_replica_context().replica_id.unique_id
    return Process(role, ray.util.get_node_ip_address(), replica_id, worker_id)
