"""The format of log lines, the same in every process: text for people, or one JSON object per line.

A record's own fields, such as request_id, come with it: `logger.info("...", extra={"fields": {"request_id": ...}})`.
docs/observability.md is the same in words.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

Format = Literal["text", "json"]

_OURS = ("cluster", "routing", "deployments", "monitoring")
# Their debug lines may hold prompts, and theirs at info say what an operator wants to know.
_LIBRARIES = ("ray", "ray.serve", "vllm")
_TEXT_OF_THEIR_OWN = ("ray", "vllm")


@dataclass(frozen=True)
class Process:
    """The fields that every line of a process has."""

    role: str
    node: str
    replica_id: str | None = None  # of Ray Serve
    worker_id: str | None = None  # of an expert worker


class JsonFormatter(logging.Formatter):
    """Writes one JSON object per line, whatever the message holds."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = _known(asdict(process))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            "pid": record.process,
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Writes `time LEVEL role pid logger: message key=value ...`. Further lines of a record, such as a traceback, are
    indented, so that no message can pass for another line.
    """

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        text = record.getMessage() + "".join(f" {name}={_word(value)}" for name, value in _fields(record).items())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        head = f"{_time(record)} {record.levelname} {self._process.role} {record.process} {record.name}: "
        return head + "\n    ".join(_printable(line) for line in text.splitlines())


def formatter(form: Format, process: Process) -> logging.Formatter:
    """Return the formatter for a process's handlers."""
    return JsonFormatter(process) if form == "json" else TextFormatter(process)


def take_over_serve(form: Format, level: str, process: Process) -> RotatingFileHandler:
    """Have all that a Ray Serve replica logs go where Serve's own lines go, its file and stderr, in our format. Returns
    the handler of the file.
    """
    serve = logging.getLogger("ray.serve")
    outputs = [getattr(handler, "target", handler) for handler in serve.handlers]  # the file is behind a buffer
    for output in outputs:
        output.setFormatter(formatter(form, process))
    logging.getLogger().handlers[:] = outputs
    for name, wanted in _levels(level).items():
        logger = logging.getLogger(name)
        logger.setLevel(wanted)
        if name in _TEXT_OF_THEIR_OWN:
            logger.handlers.clear()
            logger.propagate = True
    (file,) = (output for output in outputs if isinstance(output, RotatingFileHandler))
    return file


def child_config(form: Format, level: str, process: Process, beside: RotatingFileHandler) -> dict[str, Any]:
    """Return what the processes that vLLM starts pass to `logging.config.dictConfig`: each has a file beside `beside`.
    """
    levels = _levels(level)
    as_values = asdict(process)
    file = {
        "()": "monitoring.logs.child_file",
        "folder": str(Path(beside.baseFilename).parent),
        "process": as_values,
        "max_bytes": beside.maxBytes,
        "backups": beside.backupCount,
        "formatter": "ours",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"ours": {"()": "monitoring.logs.child_formatter", "form": form, "process": as_values}},
        "handlers": {"file": file},
        "root": {"level": levels.pop(""), "handlers": ["file"]},
        "loggers": {name: {"level": wanted} for name, wanted in levels.items()},
    }


def child_formatter(form: Format, process: Mapping[str, str]) -> logging.Formatter:
    """Return the formatter that `child_config` names."""
    return formatter(form, Process(**process))


def child_file(folder: str, process: Mapping[str, str], max_bytes: int, backups: int) -> RotatingFileHandler:
    """Open the file ROLE_REPLICA_PID.log, as `child_config` names it."""
    path = Path(folder) / f"{process['role']}_{process['replica_id']}_{os.getpid()}.log"
    return RotatingFileHandler(path, maxBytes=max_bytes, backupCount=backups)


def _levels(level: str) -> dict[str, str]:
    """Return the level of each logger; "" is the root, for libraries that are not named."""
    wanted = level.upper()
    return {
        "": _at_least(wanted, "WARNING"),
        **dict.fromkeys(_LIBRARIES, _at_least(wanted, "INFO")),
        **dict.fromkeys(_OURS, wanted),
    }


def _at_least(level: str, least: str) -> str:
    levels = logging.getLevelNamesMapping()
    return max(level, least, key=levels.__getitem__)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return _known(getattr(record, "fields", {}))


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "", ())}


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return json.dumps(text) if " " in text or not text.isprintable() else text


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() or char == "\t" else repr(char)[1:-1] for char in line)
