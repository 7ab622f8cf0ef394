"""A process that reads the file before the engine's processes start is left as it is; they log as they are told."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from logging.config import dictConfig
from logging.handlers import RotatingFileHandler
from pathlib import Path

import pytest

from cluster.config import LoggingConfig
from deployments.hosting import serve_logs
from deployments.hosting.serve_logs import EngineLogging
from monitoring.logs import Process

CHILD = """
import json, logging, sys
from logging.config import dictConfig
dictConfig(json.load(open(sys.argv[1])))
logging.getLogger("vllm").warning("hello")
"""


def test_the_file_changes_nothing_until_it_is_for_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_logs, "_process", lambda role: Process(role, "127.0.0.1", "replica", None))
    own = RotatingFileHandler(tmp_path / "own.log")
    file = tmp_path / "logging.json"
    made = EngineLogging(LoggingConfig(), own, file)
    assert made.environment == {"VLLM_LOGGING_CONFIG_PATH": str(file)}
    logging.getLogger().addHandler(own)
    try:
        before = list(logging.getLogger().handlers)
        dictConfig(json.loads(file.read_text()))
        assert logging.getLogger().handlers == before
        logging.getLogger().warning("still here")
    finally:
        logging.getLogger().removeHandler(own)
        own.close()
    assert "still here" in (tmp_path / "own.log").read_text()

    made.write_for_children()
    subprocess.run([sys.executable, "-c", CHILD, file], check=True, timeout=60)
    (log,) = tmp_path.glob("engine_replica_*.log")
    assert "hello" in log.read_text()
