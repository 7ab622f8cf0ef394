"""What the log says of a request: one line at its end, whatever that is, and no prompt, text or key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Draining, ReplicaUnavailable, Unauthenticated
from cluster.keys.api_keys import key_hash, new_key
from deployments.directory.members import ResponseHead
from monitoring.logs import JsonFormatter, Process
from tests.unit.deployments.gateway.gateway_world import JSON, LOST, SSE, FakePool, World, run, stream

WHOLE = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 2}, "choices": []}'


@pytest.fixture(autouse=True)
def at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def said(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """The one line at the end; what took time is left out after a look."""
    (line,) = (r for r in caplog.records if r.name == "deployments.gateway.meter")
    assert (line.levelname, line.message) == ("INFO", "request ended")
    fields = dict(line.fields)  # type: ignore[attr-defined]
    assert fields.pop("duration_s") >= (fields.pop("ttft_s") or 0) >= 0
    assert fields.pop("request_id") == "r1"
    return fields


def ends(
    scenario: Callable[[], Awaitable[None]], caplog: pytest.LogCaptureFixture, *, outcome: str, **expected: object
) -> None:
    run(scenario)
    line = said(caplog)
    assert line["outcome"] == outcome
    assert {name: line[name] for name in expected} == expected


def test_a_stream_with_all_there_is_to_say(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        await World(FakePool([SSE, *stream("wxyz")], names="a")).ask()

    run(scenario)
    assert said(caplog) == {
        "tenant": "anonymous", "class": "interactive", "path": "/v1/completions", "model": "tiny", "outcome": "ok",
        "status": 200, "reason": None, "plane": None, "prompt_tokens": 3, "generated_tokens": 4, "replicas": ("a",),
        "resends": 0,
    }  # fmt: skip


def test_a_stream_that_went_on_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")[:2], LOST], [SSE, *stream("yz", first=False)])
        await World(pool).ask()
        assert sorted(replica for replica, _, _ in pool.seen) == ["a", "b"]

    ends(scenario, caplog, outcome="ok", resends=1)
    (resend,) = (r for r in caplog.records if r.name == "deployments.gateway.upstream.attempts")
    assert resend.levelname == "WARNING"
    assert resend.fields == {"request_id": "r1", "continued": True}  # type: ignore[attr-defined]


def test_an_answer_that_is_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        await World(FakePool([JSON, WHOLE])).ask(stream=False)

    ends(scenario, caplog, outcome="ok", status=200, prompt_tokens=3, generated_tokens=2)


@pytest.mark.parametrize(("status", "outcome"), [(400, "client_error"), (500, "engine_error")])
def test_the_engines_own_refusal(caplog: pytest.LogCaptureFixture, status: int, outcome: str) -> None:
    async def scenario() -> None:
        pool = FakePool([ResponseHead(status, "application/json"), b"{}"], names="a")
        await World(pool).ask()

    ends(scenario, caplog, outcome=outcome, status=status)


def test_a_refusal_names_plane_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World(FakePool())
        await world.pipeline.open_requests.drain(0)
        with pytest.raises(Draining):
            await world.ask()

    ends(scenario, caplog, outcome="draining", status=503, plane="gateway", reason="draining", replicas=())


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_client_that_leaves(caplog: pytest.LogCaptureFixture, chunks: int) -> None:
    async def scenario() -> None:
        with pytest.raises(asyncio.CancelledError):
            await World(FakePool([SSE, *stream("wxyz")])).ask(leave_after=chunks)

    ends(scenario, caplog, outcome="cancelled", status=200)


def test_a_reader_that_stops_at_the_streams_own_end_is_not_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with pytest.raises(asyncio.CancelledError):
            await World(FakePool([SSE, *stream("wx")])).ask(leave_after=3)  # two tokens and the end

    ends(scenario, caplog, outcome="ok", generated_tokens=2)


def test_a_request_that_is_cut_off_while_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("w")])
        pool.hold = asyncio.Event()
        asking = asyncio.create_task(World(pool).ask())
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    ends(scenario, caplog, outcome="cancelled", status=None)


def test_what_generates_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        await World(FakePool([JSON, b"{}"], names="a")).ask("/tokenize", prompt="ab")

    ends(scenario, caplog, outcome="ok", path="/tokenize", replicas=("a",))


@pytest.mark.parametrize("asked_for", [False, True])
def test_prompts_are_written_only_if_asked_for_and_keys_never(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, asked_for: bool
) -> None:
    key, stranger = new_key(), new_key()
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"tenants: [{{name: acme, keys: ['{key_hash(key)}']}}]\n")

    async def scenario() -> None:
        mine, theirs = ({"authorization": f"Bearer {one}"} for one in (key, stranger))
        pool = FakePool([SSE, *stream("quagga")], [SSE, *stream("quagga")[:3], LOST])
        world = World(pool, keys, asked_for, max_resends=0)
        await world.ask(headers=mine, prompt="zebra")
        with pytest.raises(ReplicaUnavailable):
            await world.ask(headers=mine, prompt="zebra")
        with pytest.raises(Unauthenticated):
            await world.ask(headers=theirs, prompt="zebra")

    run(scenario)
    written = "\n".join(JsonFormatter(Process("gateway", "n")).format(record) for record in caplog.records)
    assert written.count("request ended") == 3
    assert ("zebra" in written) is asked_for
    for secret in ("quagga", key, stranger):
        assert secret not in written
