"""The ids of a step are there while the model runs and while MTP drafts after it."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.worker.cpu_worker import CPUWorker

from deployments.attention.engine_args import WORKER
from deployments.attention.engine_worker import RequestIdsWorker
from routing.tokens.request_ids import STEP_REQUEST_IDS


def step(**tokens: int) -> Any:
    return SimpleNamespace(num_scheduled_tokens=tokens)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vLLM's own worker would have dispatched with."""
    seen: list[str] = []
    monkeypatch.setattr(CPUWorker, "execute_model", lambda self, output: seen.append(STEP_REQUEST_IDS.get()))
    monkeypatch.setattr(CPUWorker, "sample_tokens", lambda self, grammar: seen.append(STEP_REQUEST_IDS.get()))
    return seen


def test_each_step_has_its_own_ids_drafting_included(seen: list[str]) -> None:
    worker = object.__new__(RequestIdsWorker)
    worker.execute_model(step(a=5, b=1))
    worker.sample_tokens(None)
    worker.execute_model(step(b=1))
    worker.sample_tokens(None)
    worker.execute_model(step())
    assert seen == ["a,b", "a,b", "b", "b", ""]


def test_at_debug_level_each_step_is_a_line(seen: list[str], caplog: pytest.LogCaptureFixture) -> None:
    worker = object.__new__(RequestIdsWorker)
    worker.execute_model(step(a=5, b=1))
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="deployments.attention.engine_worker"):
        worker.execute_model(step(a=5, b=1))
    (line,) = caplog.records
    assert line.fields == {"request_id": "a,b", "requests": 2, "tokens": 6}  # type: ignore[attr-defined]


def test_imported_modules_are_no_business_of_the_collections_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(CPUWorker, "load_model", lambda self, **options: frozen.append(gc.get_freeze_count()))
    try:
        object.__new__(RequestIdsWorker).load_model(load_dummy_weights=False)
    finally:
        gc.unfreeze()
    assert frozen[0] > 100_000


def test_it_is_what_the_engine_is_told_to_use() -> None:
    assert f"{RequestIdsWorker.__module__}.{RequestIdsWorker.__name__}" == WORKER
