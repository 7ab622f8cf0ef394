"""Lines for people and for machines; where they go in a Serve replica and in the processes that vLLM starts."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from monitoring.logs import JsonFormatter, Process, TextFormatter, child_config, take_over_serve

WORKER = Process("experts", "10.0.0.7", "r-1", "experts-1")


def record(message: str, fields: dict[str, object] | None = None, error: Exception | None = None) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {
            "name": "routing.tokens.server", "levelno": logging.WARNING, "levelname": "WARNING", "msg": message,
            "created": 1795523045.25, "process": 4242, "exc_info": error and (type(error), error, None),
        }
    )  # fmt: skip
    made.fields = fields or {}
    return made


def test_json_has_every_field_and_leaves_out_what_is_not_known() -> None:
    fields = {"request_id": "cmpl-a", "tenant": None, "status": 0, "replicas": ("x", "y"), "ttft_s": 0.25}
    assert json.loads(JsonFormatter(WORKER).format(record("late", fields))) == {
        "time": "2026-11-24T12:24:05.250Z", "level": "warning", "logger": "routing.tokens.server", "message": "late",
        "role": "experts", "node": "10.0.0.7", "replica_id": "r-1", "worker_id": "experts-1", "pid": 4242,
        "request_id": "cmpl-a", "status": 0, "replicas": ["x", "y"], "ttft_s": 0.25,
    }  # fmt: skip


def test_text_is_one_line_with_its_fields() -> None:
    fields = {"request_id": "cmpl-a", "path": "a b", "replicas": ("x", "y"), "ttft_s": 0.25, "plane": None}
    assert TextFormatter(WORKER).format(record("late", fields)) == (
        "2026-11-24T12:24:05.250Z WARNING experts 4242 routing.tokens.server: late "
        'request_id=cmpl-a path="a b" replicas=x,y ttft_s=0.250'
    )


def test_an_exception_is_a_field_of_json_and_indented_in_text() -> None:
    failed = record("failed", error=ValueError("shard\n3"))
    assert json.loads(JsonFormatter(WORKER).format(failed))["exception"] == "ValueError: shard\n3"
    assert TextFormatter(WORKER).format(failed).splitlines()[1:] == ["    ValueError: shard", "    3"]


@given(st.text(), st.text())
def test_nothing_said_by_others_can_pass_as_a_line_of_ours(message: str, request_id: str) -> None:
    said = record("%s", {"request_id": request_id})
    said.args = (message,)
    line = JsonFormatter(WORKER).format(said)
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["message"] == message
    first, *more = TextFormatter(WORKER).format(said).split("\n")
    assert first.startswith("2026-11-24T12:24:05.250Z WARNING")
    for part in (first, *more):
        assert part.replace("\t", "").isprintable()
    assert all(part.startswith("    ") for part in more)


@contextmanager
def serve_log(folder: Path) -> Iterator[Path]:
    """Handlers as Ray Serve leaves them in a replica; afterwards all loggers are as before."""
    # No fixture: pytest's own handlers, which it changes with each phase of a test, would be taken for Serve's.
    names = ("", "ray", "ray.serve", "vllm", "cluster", "routing", "deployments", "monitoring")
    before = [(log, log.handlers[:], log.level, log.propagate) for log in map(logging.getLogger, names)]
    serve = logging.getLogger("ray.serve")
    file = RotatingFileHandler(folder / "replica.log", maxBytes=1 << 20, backupCount=2)
    serve.handlers[:] = [MemoryHandler(1, target=file)]
    serve.propagate = False
    try:
        yield folder / "replica.log"
    finally:
        for log, handlers, level, propagate in before:
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)
        file.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_replicas_lines_all_go_to_serves_file(tmp_path: Path) -> None:
    with serve_log(tmp_path) as path:
        take_over_serve("json", "debug", WORKER)
        for name in ("routing.tokens.client", "deployments.app", "ray.serve", "vllm.engine", "aiohttp.server"):
            logging.getLogger(name).debug("low")
            logging.getLogger(name).info("middle")
            logging.getLogger(name).warning("high")
    said = [(line["logger"], line["level"]) for line in lines(path)]
    levels = ("debug", "info", "warning")
    ours = [(name, level) for name in ("routing.tokens.client", "deployments.app") for level in levels]
    theirs = [(name, level) for name in ("ray.serve", "vllm.engine") for level in ("info", "warning")]
    assert said == [*ours, *theirs, ("aiohttp.server", "warning")]
    assert {line["worker_id"] for line in lines(path)} == {"experts-1"}


def test_the_level_holds_for_libraries_too(tmp_path: Path) -> None:
    with serve_log(tmp_path) as path:
        take_over_serve("json", "error", WORKER)
        for name in ("routing.tokens.client", "ray.serve", "vllm.engine", "aiohttp.server"):
            logging.getLogger(name).warning("high")
            logging.getLogger(name).error("highest")
    assert [line["level"] for line in lines(path)] == ["error"] * 4


def test_a_process_that_vllm_starts_has_a_file_beside_the_replicas(tmp_path: Path) -> None:
    with serve_log(tmp_path):
        file = take_over_serve("json", "info", WORKER)
    config = json.dumps(child_config("json", "info", Process("engine", "10.0.0.7", "r-1"), file))
    code = (
        "import json, logging.config, sys; logging.config.dictConfig(json.loads(sys.argv[1]));"
        "logging.getLogger('routing.tokens.client').info('ours', extra={'fields': {'request_id': 'cmpl-a'}});"
        "logging.getLogger('vllm.core').info('theirs'); logging.getLogger('routing.tokens.client').debug('low')"
    )
    child = subprocess.Popen([sys.executable, "-c", code, config])
    assert child.wait(60) == 0
    said = lines(tmp_path / f"engine_r-1_{child.pid}.log")
    expected = [("routing.tokens.client", "ours"), ("vllm.core", "theirs")]
    assert [(line["logger"], line["message"]) for line in said] == expected
    assert (said[0]["role"], said[0]["replica_id"], said[0]["request_id"]) == ("engine", "r-1", "cmpl-a")
