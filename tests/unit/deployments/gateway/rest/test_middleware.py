"""What holds for every HTTP request: pages of other origins, bugs, ids."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from cluster.errors import Overloaded, Plane, Reason
from tests.unit.deployments.gateway.gateway_world import COMPLETIONS, SSE, FakePool, event, run, stream
from tests.unit.deployments.gateway.rest.rest_world import (
    ANSWER,
    GUEST_KEY,
    RestWorld,
    body_of,
    call,
    get,
    keys_file,
    post,
    request,
)

PAGE = "https://chat.example.com"
BUSY = Overloaded("busy", retry_after_s=1.2, plane=Plane.EXPERTS, reason=Reason.TTFT)


def preflight(world: RestWorld, origin: str, path: str = COMPLETIONS) -> httpx.Response:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    return request(world, "OPTIONS", path, {"origin": origin, **asks})


def test_pages_may_call_nothing_by_default() -> None:
    world = RestWorld(FakePool(ANSWER))
    answer = post(world, headers={"origin": PAGE})
    assert answer.status_code == 200
    asked = preflight(world, PAGE)
    assert asked.status_code == 405
    assert not [name for name in (*answer.headers, *asked.headers) if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [[PAGE], [PAGE, "http://localhost:3000"], ["*"]])
def test_a_preflight_needs_no_key(origins: list[str], tmp_path: Path) -> None:
    world = RestWorld(FakePool(), keys_file(tmp_path), cors_origins=origins)
    for path in (COMPLETIONS, "/v1/models", "/v1/completions/"):
        answer = preflight(world, PAGE, path)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers


def test_pages_of_other_origins_stay_out() -> None:
    world = RestWorld(FakePool(ANSWER), cors_origins=[PAGE])
    for origin in ("https://evil.example.com", "null", f"{PAGE}.evil.com", "http://chat.example.com"):
        assert preflight(world, origin).status_code == 400
        world.pool.scripts = [ANSWER]
        assert "access-control-allow-origin" not in post(world, headers={"origin": origin}).headers


@pytest.mark.parametrize(
    "what", ["answer", "stream", "refusal", "no key", "unknown path", "wrong method", "bug", "models"]
)
def test_pages_can_read_every_answer_and_what_it_says_beside_it(what: str, tmp_path: Path) -> None:
    def world(*script: object, keys: object = None) -> RestWorld:
        return RestWorld(FakePool(script), keys, cors_origins=[PAGE], max_resends=0)  # type: ignore[arg-type]

    headers = {"origin": PAGE}
    if what == "answer":
        status, answer = 200, post(world(*ANSWER), headers=headers)
    elif what == "stream":
        status, answer = 200, post(world(SSE, *stream("wxyz")), {"stream": True}, headers=headers)
    elif what == "refusal":
        status, answer = 429, post(world(BUSY), headers=headers)
        assert answer.headers["retry-after"] == "2"
    elif what == "no key":
        status, answer = 401, post(world(keys=keys_file(tmp_path)), headers=headers)
    elif what == "unknown path":
        status, answer = 404, post(world(), path="/nowhere", headers=headers)
    elif what == "wrong method":
        status, answer = 405, get(world(), COMPLETIONS, headers)
    elif what == "bug":
        status, answer = 500, post(world(ZeroDivisionError("secret")), headers=headers)
    else:
        status, answer = 200, get(world(), "/v1/models", headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
    shown = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests"} <= set(shown)
    assert answer.headers["x-request-id"]


def bugs(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_bug_is_a_500_without_details_and_one_line_in_the_log(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([ZeroDivisionError("secret")], ANSWER))
        async with world.served() as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = await http.post(path, content=body_of(path), headers={"x-request-id": "r1"})
            assert answer.status_code == 500
            assert "secret" not in answer.text
            message = answer.json()["error"]["message"]
            assert ("internal error" in message, "r1" in message) == (True, True)
            assert answer.headers["x-request-id"] == "r1"
            assert ("type" in answer.json()) == (path == "/v1/messages")
            assert world.nothing_left()
            assert (await http.post(path, content=body_of(path))).status_code == 200

    run(scenario)
    (line,) = bugs(caplog)
    assert line.fields == {"request_id": "r1"}  # type: ignore[attr-defined]
    assert line.exc_info is not None
    assert "secret" in str(line.exc_info[1])


def test_a_bug_outside_of_the_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool())
        world.pool.loads = None  # type: ignore[assignment,method-assign]
        async with world.served() as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = await http.get("/ready", headers={"x-request-id": "r1"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r1")
            assert "internal error" in answer.json()["error"]["message"]

    run(scenario)
    assert [line.fields for line in bugs(caplog)] == [{"request_id": "r1"}]  # type: ignore[attr-defined]


def test_a_bug_in_mid_stream_is_the_streams_last_event(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool([SSE, event(65, first=True), ZeroDivisionError("secret")]))
        sent = await call(world, content=body_of(COMPLETIONS, {"stream": True}))
        body = b"".join(message["body"] for message in sent[1:])
        assert sent[-1]["more_body"] is False
        assert body.rpartition(b"data: ")[2].startswith(b'{"error":')
        assert b"secret" not in body
        assert b"[DONE]" not in body
        assert world.nothing_left()

    run(scenario)
    assert len(bugs(caplog)) == 1


def test_a_cancelled_request_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, event(65)])
        pool.hold = asyncio.Event()
        world = RestWorld(pool)
        calling = asyncio.create_task(call(world, content=body_of(COMPLETIONS, {"stream": True})))
        await pool.sending.wait()
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        assert world.nothing_left()

    run(scenario)
    assert bugs(caplog) == []


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", COMPLETIONS])
def test_the_log_and_the_response_name_the_same_id(path: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    guest = {"authorization": f"Bearer {GUEST_KEY}"}
    world = RestWorld(FakePool(), keys_file(tmp_path))
    answer = post(world, headers=guest) if path == COMPLETIONS else get(world, path, guest)
    (line,) = (record for record in caplog.records if record.message == "request ended")
    told = line.fields  # type: ignore[attr-defined]
    assert (told["request_id"], told["status"]) == (answer.headers["x-request-id"], answer.status_code)
