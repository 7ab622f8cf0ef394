"""The REST application over a plane that runs in this process; no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.errors import ReplicaUnavailable
from deployments.attention import ResponseHead
from deployments.rest import RestApi

JSON, SSE = "application/json", "text/event-stream; charset=utf-8"


class EchoPlane:
    """Answers with what it was sent. `events` makes it stream; `fails_after` raises after that many items."""

    def __init__(self, events: int = 0, fails_after: int | None = None, delay_s: float = 0) -> None:
        self.events, self.fails_after, self.delay_s = events, fails_after, delay_s
        self.closed = asyncio.Event()

    async def http(self, method: str, path: str, body: bytes, request_id: str) -> AsyncGenerator[ResponseHead | bytes]:
        seen = json.dumps({"method": method, "path": path, "body": body.decode(), "id": request_id}).encode()
        items: list[ResponseHead | bytes] = [ResponseHead(200, SSE if self.events else JSON)]
        items += [b"data: %d\n\n" % i for i in range(self.events)] or [seen]
        try:
            for number, item in enumerate(items):
                if number == self.fails_after:
                    raise ReplicaUnavailable("the replica died")
                yield item
                await asyncio.sleep(self.delay_s)
        finally:
            self.closed.set()

    async def status(self) -> Mapping[str, object]:
        if self.fails_after is not None:
            raise ReplicaUnavailable("not yet")
        return {"engine": {"running": 0}}


def client(plane: EchoPlane, **limits: float) -> httpx.AsyncClient:
    app = RestApi("tiny", GatewayConfig.model_validate(limits), plane).app
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway")


async def post(plane: EchoPlane, content: bytes, **limits: float) -> httpx.Response:
    async with client(plane, **limits) as http:
        return await http.post("/v1/completions", content=content, headers={"x-request-id": "r1"})


def test_bytes_reach_the_replica_unchanged() -> None:
    body = '{ "model": "tiny",\n "prompt": "é", "field_of_tomorrow": [1, 2] }'
    answer = asyncio.run(post(EchoPlane(), body.encode()))
    assert answer.status_code == 200
    assert answer.json() == {"method": "POST", "path": "/v1/completions", "body": body, "id": "r1"}


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{bad", 400, "bad_request", "not valid JSON"),
        (b"", 400, "bad_request", "not valid JSON"),
        (b"[" * 100_000, 400, "bad_request", "not valid JSON"),
        (b"\xff\xfe\x00", 400, "bad_request", "not valid JSON"),
        (b"[1]", 400, "bad_request", "must be a JSON object, not list"),
        (b'{"model": 7}', 400, "bad_request", "`model` must be a string, not int"),
        (b'{"model": "other"}', 404, "model_not_found", "'other' does not exist; this server has 'tiny'"),
        (b" " * (2**20 + 1), 413, "too_large", "larger than 1 MiB"),
    ],
)
def test_a_bad_body_never_reaches_a_replica(body: bytes, status: int, code: str, message: str) -> None:
    plane = EchoPlane()
    answer = asyncio.run(post(plane, body, max_body_mib=1))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not plane.closed.is_set()


def test_a_body_that_hides_its_length_is_bounded_too() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 2**19

    async def run() -> httpx.Response:
        async with client(EchoPlane(), max_body_mib=1) as http:
            return await http.post("/v1/completions", content=chunks())

    assert asyncio.run(run()).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/x", 404)]
)
def test_unknown_routes_have_openai_errors(method: str, path: str, status: int) -> None:
    async def run() -> httpx.Response:
        async with client(EchoPlane()) as http:
            return await http.request(method, path)

    answer = asyncio.run(run())
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert path in answer.json()["error"]["message"]


def test_a_replica_that_dies_before_the_end_is_a_503() -> None:
    for items in (0, 1):  # before the head, and before the body
        answer = asyncio.run(post(EchoPlane(fails_after=items), b"{}"))
        assert answer.status_code == 503
        assert answer.json()["error"] == {
            "message": "the replica died", "type": "server_error", "param": None, "code": "replica_unavailable",
        }  # fmt: skip


def test_a_replica_that_dies_in_a_stream_ends_it_with_an_error_event() -> None:
    answer = asyncio.run(post(EchoPlane(events=5, fails_after=3), b"{}"))
    assert answer.headers["content-type"] == SSE
    *events, last, end = answer.text.split("\n\n")
    assert events == ["data: 0", "data: 1"]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_unavailable"
    assert end == ""


@pytest.mark.parametrize("events", [0, 50])
def test_the_deadline_ends_the_request_and_the_generation(events: int) -> None:
    async def run() -> httpx.Response:
        plane = EchoPlane(events=events, delay_s=0.2)
        answer = await post(plane, b"{}", request_timeout_s=0.1)
        await asyncio.wait_for(plane.closed.wait(), 1)
        return answer

    answer = asyncio.run(run())
    assert answer.status_code == (200 if events else 504)
    assert "request_timeout" in answer.text.split("\n\n")[-2 if events else 0]


def test_a_client_that_leaves_a_stream_aborts_the_generation() -> None:
    async def run() -> None:
        plane = EchoPlane(events=1000, delay_s=0.01)
        app = RestApi("tiny", GatewayConfig.model_validate({}), plane).app
        leave = asyncio.Event()
        requests = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Mapping[str, object]:
            if requests:
                return requests.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, object]) -> None:
            if message.get("body"):
                leave.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await asyncio.wait_for(app(scope, receive, send), 5)  # type: ignore[arg-type]
        await asyncio.wait_for(plane.closed.wait(), 1)

    asyncio.run(run())


def test_ready_asks_the_replicas_and_health_does_not() -> None:
    async def run() -> list[int]:
        async with client(EchoPlane(fails_after=0)) as http:
            return [(await http.get(path)).status_code for path in ("/health", "/ready")]

    assert asyncio.run(run()) == [200, 503]
