"""OpenAI's own client decides when to ask again: what our errors tell it, over the real REST application."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping

import httpx
import openai
import pytest

from cluster.errors import (
    DeepsplitError,
    Draining,
    EngineKilled,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    Plane,
    QuotaExceeded,
    Reason,
    ReplicaUnavailable,
    RequestTimeout,
    StreamLost,
)
from deployments.directory.members import ResponseHead
from tests.unit.deployments.gateway.gateway_world import JSON, FakePool
from tests.unit.deployments.gateway.rest.rest_world import RestWorld

WAIT_S = 0.3
CHOICE = {"index": 0, "text": "fine", "finish_reason": "stop"}
COMPLETION = {"id": "c", "object": "text_completion", "created": 1, "model": "tiny", "choices": [CHOICE]}


class FailsOnce(FakePool):
    """The first answer is an error."""

    def __init__(self, error: DeepsplitError) -> None:
        super().__init__([error], [JSON, json.dumps(COMPLETION).encode()])
        self.asked_s: list[float] = []

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        self.asked_s.append(time.monotonic())
        async for item in super().send(replica_id, method, path, body, headers):
            yield item


def ask(pool: FailsOnce) -> openai.types.Completion:
    async def run() -> openai.types.Completion:
        transport = httpx.ASGITransport(RestWorld(pool, max_resends=0).app)
        async with openai.AsyncOpenAI(
            base_url="http://gateway/v1", api_key="none", max_retries=1,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:  # fmt: skip
            return await client.completions.create(model="tiny", prompt="a")

    return asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("busy", retry_after_s=WAIT_S, plane=Plane.EXPERTS, reason=Reason.TTFT),
        QuotaExceeded("used up", retry_after_s=WAIT_S, plane=Plane.QUOTA, reason=Reason.REQUESTS_PER_MINUTE),
        Draining("bye", retry_after_s=WAIT_S, plane=Plane.GATEWAY, reason=Reason.DRAINING),
        NoCapacity("nobody", retry_after_s=WAIT_S, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA),
        ReplicaUnavailable("gone"),
        StreamLost("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_go_well_later_is_asked_again_after_the_stated_time(error: DeepsplitError) -> None:
    pool = FailsOnce(error)
    assert ask(pool).choices[0].text == "fine"
    first_s, second_s = pool.asked_s
    if hasattr(error, "retry_after_s"):
        assert second_s - first_s >= WAIT_S


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ModelNotFound("no such model"), openai.NotFoundError),
        (RequestTimeout("slow"), openai.InternalServerError),
        (EngineKilled("two engines died of it"), openai.InternalServerError),
        (
            QuotaExceeded("never", retry_after_s=math.inf, plane=Plane.QUOTA, reason=Reason.REQUEST_OVER_BUDGET),
            openai.RateLimitError,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_go_well_is_asked_once(error: DeepsplitError, raised: type[openai.APIStatusError]) -> None:
    pool = FailsOnce(error)
    with pytest.raises(raised):
        ask(pool)
    assert len(pool.asked_s) == 1
