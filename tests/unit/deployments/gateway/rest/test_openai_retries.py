"""OpenAI's own client decides when to ask again: what our errors tell it, over the real REST application."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import (
    DeepsplitError,
    Draining,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    QuotaExceeded,
    ReplicaUnavailable,
    RequestTimeout,
    StreamLost,
)
from deployments.gateway.door import Answer, Call
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.rest.api import RestApi
from routing.requests.request import Tenant

WAIT_S = 0.3
CHOICE = {"index": 0, "text": "fine", "finish_reason": "stop"}
COMPLETION = {"id": "c", "object": "text_completion", "created": 1, "model": "tiny", "choices": [CHOICE]}


class FailsOnce:
    """A door whose first answer is an error."""

    def __init__(self, error: DeepsplitError) -> None:
        self._errors = [error]
        self.asked_s: list[float] = []

    @contextmanager
    def arriving(self, path: str, key: str | None, request_id: str) -> Iterator[None]:
        yield

    async def answer(self, call: Call) -> Answer:
        self.asked_s.append(time.monotonic())
        if self._errors:
            raise self._errors.pop()
        return Answer(200, "application/json", {}, self._chunks())

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        yield json.dumps(COMPLETION).encode()

    def ready(self) -> Mapping[str, bool]:
        return {"tiny": True}

    def identify(self, key: str | None) -> Tenant:
        return Tenant("t")


async def nothing() -> bytes:
    return b""


async def status() -> Mapping[str, object]:
    return {}


def ask(door: FailsOnce) -> openai.types.Completion:
    async def run() -> openai.types.Completion:
        pages = OperatorPages(CollectorRegistry(), lambda: b"[]", status)
        transport = httpx.ASGITransport(RestApi(door, 2**20, pages, nothing).app)
        async with openai.AsyncOpenAI(
            base_url="http://gateway/v1", api_key="none", max_retries=1,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:  # fmt: skip
            return await client.completions.create(model="tiny", prompt="a")

    return asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("busy", retry_after_s=WAIT_S, plane="experts", reason="ttft"),
        QuotaExceeded("used up", retry_after_s=WAIT_S, plane="quota", reason="requests_per_minute"),
        Draining("bye", retry_after_s=WAIT_S, plane="gateway", reason="draining"),
        NoCapacity("nobody", retry_after_s=WAIT_S, plane="attention", reason="no_replica"),
        ReplicaUnavailable("gone"),
        StreamLost("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_go_well_later_is_asked_again_after_the_stated_time(error: DeepsplitError) -> None:
    door = FailsOnce(error)
    assert ask(door).choices[0].text == "fine"
    first_s, second_s = door.asked_s
    if hasattr(error, "retry_after_s"):
        assert second_s - first_s >= WAIT_S


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ModelNotFound("no such model"), openai.NotFoundError),
        (RequestTimeout("slow"), openai.InternalServerError),
        (
            QuotaExceeded("never", retry_after_s=math.inf, plane="quota", reason="request_over_budget"),
            openai.RateLimitError,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_go_well_is_asked_once(error: DeepsplitError, raised: type[openai.APIStatusError]) -> None:
    door = FailsOnce(error)
    with pytest.raises(raised):
        ask(door)
    assert len(door.asked_s) == 1
