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


def write_engine_logging(settings: LoggingConfig, beside: RotatingFileHandler, path: Path) -> dict[str, str]:
    """Write the logging of vLLM's processes to `path`. Returns the environment that makes them read it."""
    path.write_text(json.dumps(child_config(settings.format, settings.level, _process("engine"), beside)))
    return {"VLLM_LOGGING_CONFIG_PATH": str(path)}


def _process(role: str, worker_id: str | None = None) -> Process:
    replica_id = serve.get_replica_context().replica_id.unique_id
    return Process(role, ray.util.get_node_ip_address(), replica_id, worker_id)
