"""The REST application over a door that runs in this process; no Ray."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.types import Message

from cluster.errors import (
    DeepsplitError,
    Draining,
    ModelNotFound,
    Overloaded,
    QuotaExceeded,
    RateLimits,
    ReplicaUnavailable,
    RequestTimeout,
    StreamLost,
    Unauthenticated,
)
from deployments.gateway.door import Answer, Call
from deployments.gateway.operator_pages import OperatorPages
from deployments.gateway.rest.api import MAX_ID_CHARS, RestApi
from routing.requests.request import Tenant

JSON, SSE = "application/json", "text/event-stream; charset=utf-8"


class EchoDoor:
    """Answers with the call it got. `events` makes it stream; `fails_after` raises after that many chunks."""

    def __init__(self, events: int = 0, error: DeepsplitError | None = None, fails_after: int = 0) -> None:
        self.events, self.error, self.fails_after = events, error, fails_after
        self.entered, self.closed = asyncio.Event(), asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.arrivals: list[str] = []

    @contextmanager
    def arriving(self, path: str, key: str | None, request_id: str) -> Iterator[None]:
        self.identify(key)
        self.arrivals.append(path)
        yield

    async def answer(self, call: Call) -> Answer:
        self.entered.set()
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.closed.set()
            raise
        if self.error is not None and not self.fails_after:
            raise self.error
        seen = json.dumps({**vars(call), "body": call.body.decode()}).encode()
        chunks = [b"data: %d\n\n" % i for i in range(self.events)] or [seen]
        headers = {"x-request-id": call.request_id}
        return Answer(200, SSE if self.events else JSON, headers, self._chunks(chunks))

    async def _chunks(self, chunks: list[bytes]) -> AsyncGenerator[bytes, None]:
        try:
            for number, chunk in enumerate(chunks):
                if self.error is not None and number == self.fails_after:
                    raise self.error
                yield chunk
                await asyncio.sleep(0)
        finally:
            self.closed.set()

    def ready(self) -> Mapping[str, bool]:
        return {"tiny": self.error is None}

    def identify(self, key: str | None) -> Tenant:
        if key == "wrong":
            raise Unauthenticated("no such key")
        return Tenant("t", operator=key != "guest")


async def status() -> Mapping[str, object]:
    return {"model": "tiny"}


async def document() -> bytes:
    return b'{"openapi": "3.1.0"}'


def api(door: EchoDoor) -> RestApi:
    registry = CollectorRegistry()
    Counter("deepsplit_seen", "Something seen.", registry=registry).inc()
    return RestApi(door, 2**20, OperatorPages(registry, lambda: b'[{"targets": []}]', status), document)


def client(door: EchoDoor) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(api(door).app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def post(
    door: EchoDoor, content: bytes = b"{}", path: str = "/v1/completions", headers: Mapping[str, str] | None = None
) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(door) as http:
            return await http.post(path, content=content, headers=headers)

    return asyncio.run(run())


def get(door: EchoDoor, path: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(door) as http:
            return await http.get(path, headers=headers)

    return asyncio.run(run())


def test_everything_the_door_needs_reaches_it() -> None:
    body = '{ "model": "tiny",\n "prompt": "é", "field_of_tomorrow": [1, 2] }'
    headers = {
        "x-request-id": "r1", "authorization": "Bearer k1", "x-deepsplit-priority": "batch",
        "x-deepsplit-timeout-s": "12.5", "x-deepsplit-ttft-s": "2",
    }  # fmt: skip
    answer = post(EchoDoor(), body.encode(), headers=headers)
    assert answer.json() == {
        "method": "POST", "path": "/v1/completions", "body": body, "request_id": "r1", "key": "k1",
        "priority": "batch", "timeout_s": 12.5, "ttft_s": 2.0,
    }  # fmt: skip
    assert answer.headers["x-request-id"] == "r1"


def test_without_headers() -> None:
    seen = post(EchoDoor()).json()
    assert (seen["key"], seen["priority"], seen["timeout_s"], seen["ttft_s"]) == (None, None, None, None)
    assert len(seen["request_id"]) == 32


def test_anthropic_clients_send_their_key_elsewhere() -> None:
    assert post(EchoDoor(), path="/v1/messages", headers={"x-api-key": "k2"}).json()["key"] == "k2"


def test_a_request_id_is_bounded() -> None:
    assert len(post(EchoDoor(), headers={"x-request-id": "r" * 5000}).json()["request_id"]) == MAX_ID_CHARS


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_deadline_that_is_no_number(value: str) -> None:
    answer = post(EchoDoor(), headers={"x-deepsplit-timeout-s": value})
    assert answer.status_code == 400
    assert "x-deepsplit-timeout-s must be a number of seconds above 0" in answer.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_bound_is_not_read_on(declared: bool) -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for _ in range(3):
            yield b" " * 2**19

    async def run() -> httpx.Response:
        async with client(EchoDoor()) as http:
            content = b" " * (2**20 + 1) if declared else pieces()
            return await http.post("/v1/completions", content=content)

    answer = asyncio.run(run())
    assert answer.status_code == 413
    assert "larger than 1 MiB" in answer.json()["error"]["message"]


def test_a_strangers_body_is_not_read() -> None:
    read = 0

    async def pieces() -> AsyncGenerator[bytes, None]:
        nonlocal read
        read += 1
        yield b"{}"

    async def run() -> httpx.Response:
        async with client(door) as http:
            return await http.post("/v1/completions", content=pieces(), headers={"x-api-key": "wrong"})

    door = EchoDoor()
    assert asyncio.run(run()).status_code == 401
    assert (read, door.arrivals, door.entered.is_set()) == (0, [], False)
    assert post(door).status_code == 200
    assert door.arrivals == ["/v1/completions"]


BUSY = Overloaded("busy", retry_after_s=1.2, plane="experts", reason="ttft")
LIMITS = RateLimits(100, 0, 6.0, 5000, 40, 30.5)


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (Unauthenticated("no key"), 401, "authentication_error", {"www-authenticate": "Bearer"}),
        (ModelNotFound("no such model"), 404, "not_found_error", {}),
        (BUSY, 429, "rate_limit_error", {"retry-after": "2", "retry-after-ms": "1200"}),
        (
            QuotaExceeded("used up", retry_after_s=0.2, plane="quota", reason="tokens", limits=LIMITS), 429,
            "rate_limit_error",
            {
                "retry-after": "1", "x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "6.0s", "x-ratelimit-remaining-tokens": "40",
            },
        ),
        (
            QuotaExceeded("never", retry_after_s=math.inf, plane="quota", reason="tokens"), 429, "rate_limit_error",
            {"x-should-retry": "false"},
        ),
        (
            Draining("bye", retry_after_s=2, plane="gateway", reason="draining"),
            503,
            "server_error",
            {"retry-after": "2", "connection": "close"},
        ),
        (RequestTimeout("slow"), 504, "server_error", {"x-should-retry": "false"}),
        (ReplicaUnavailable("gone"), 503, "server_error", {"retry-after": "2"}),
    ],
)  # fmt: skip
def test_errors_in_openais_shape(error: DeepsplitError, status: int, kind: str, headers: dict[str, str]) -> None:
    answer = post(EchoDoor(error=error))
    assert answer.status_code == status
    body = answer.json()["error"]
    assert (body["message"], body["type"], body["code"]) == (str(error), kind, error.outcome)
    assert {name: answer.headers[name] for name in headers} == headers


def test_a_refusal_names_the_plane() -> None:
    assert post(EchoDoor(error=BUSY)).json()["error"]["plane"] == "experts"


def test_errors_in_anthropics_shape() -> None:
    body = post(EchoDoor(error=BUSY), path="/v1/messages").json()
    assert body == {"type": "error", "error": {"type": "rate_limit_error", "message": "busy"}}


@pytest.mark.parametrize(
    ("path", "first_line"),
    [("/v1/completions", b"data: "), ("/v1/responses", b"event: error"), ("/v1/messages", b"event: error")],
)
def test_a_stream_that_fails_ends_with_the_error_and_without_done(path: str, first_line: bytes) -> None:
    door = EchoDoor(events=3, error=StreamLost("cannot go on"), fails_after=2)
    answer = post(door, path=path)
    assert answer.status_code == 200
    head, last = answer.content.split(b"data: 1\n\n")
    assert head == b"data: 0\n\n"
    assert last.startswith(first_line)
    assert b"cannot go on" in last
    assert b"[DONE]" not in last
    assert door.closed.is_set()


def test_streams_may_not_be_buffered() -> None:
    answer = post(EchoDoor(events=2))
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.content == b"data: 0\n\ndata: 1\n\n"


@pytest.mark.parametrize("path", ["/nowhere", "/v1/embeddings", "/docs"])
def test_unknown_paths(path: str) -> None:
    answer = post(EchoDoor(), path=path)
    assert answer.status_code == 404
    assert path in answer.json()["error"]["message"]


def test_wrong_method() -> None:
    assert get(EchoDoor(), "/v1/completions").status_code == 405


def test_health_readiness_status_and_document() -> None:
    sick = EchoDoor(error=BUSY)
    assert get(sick, "/health").status_code == 200
    assert (get(sick, "/ready").status_code, get(EchoDoor(), "/ready").status_code) == (503, 200)
    assert get(EchoDoor(), "/v1/deepsplit/status").json() == {"model": "tiny"}


@pytest.mark.parametrize("path", ["/v1/deepsplit/status", "/metrics", "/sd/prometheus"])
def test_operator_pages_are_for_operators(path: str) -> None:
    assert get(EchoDoor(), path).status_code == 200
    assert get(EchoDoor(), path, {"authorization": "Bearer wrong"}).status_code == 401
    refused = get(EchoDoor(), path, {"authorization": "Bearer guest"})
    assert refused.status_code == 403
    assert "operator: true" in refused.json()["error"]["message"]


def test_metrics_and_discovery_as_prometheus_reads_them() -> None:
    metrics = get(EchoDoor(), "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert "deepsplit_seen_total 1.0" in metrics.text
    assert get(EchoDoor(), "/sd/prometheus").json() == [{"targets": []}]
    assert get(EchoDoor(), "/openapi.json").json()["openapi"] == "3.1.0"


def test_a_bug_is_a_500_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(EchoDoor):
        async def answer(self, call: Call) -> Answer:
            raise ZeroDivisionError("secret")

    answer = post(Broken())
    assert answer.status_code == 500
    assert "secret" not in answer.text


async def _call(door: EchoDoor, leave_after: int) -> list[Message]:
    """The application called as a server does; the client goes away after `leave_after` messages (0: at once)."""
    sent: list[Message] = []
    gone = asyncio.Event()
    requests: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()
            await asyncio.sleep(0.01)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
        "root_path": "", "headers": [], "client": None, "server": None,
    }  # fmt: skip
    running = asyncio.create_task(api(door).app(scope, receive, send))
    if leave_after == 0:
        await door.entered.wait()
        gone.set()
    await asyncio.wait_for(running, 10)
    return sent


def test_a_client_that_leaves_while_it_waits_is_withdrawn() -> None:
    async def run() -> None:
        door = EchoDoor()
        door.hold = asyncio.Event()
        await _call(door, leave_after=0)
        assert door.closed.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("messages", [1, 3])
def test_a_client_that_leaves_in_mid_stream_ends_the_generation(messages: int) -> None:
    async def run() -> None:
        door = EchoDoor(events=10_000)
        sent = await _call(door, leave_after=messages)
        assert door.closed.is_set() or messages == 1  # before the first chunk nothing runs that could be closed
        assert len(sent) < 100

    asyncio.run(run())


def test_a_stream_whose_first_chunk_is_never_asked_for_is_closed() -> None:
    class Unread(EchoDoor):
        async def answer(self, call: Call) -> Answer:
            made = await super().answer(call)
            door = self

            class Chunks(AsyncGenerator[bytes, None]):
                async def asend(self, value: None) -> bytes:
                    return await anext(made.chunks)

                async def athrow(self, typ: object, val: object = None, tb: object = None) -> bytes:
                    raise StopAsyncIteration

                async def aclose(self) -> None:
                    door.closed.set()

            return replace(made, chunks=Chunks())

    async def run() -> None:
        door = Unread(events=5)
        await _call(door, leave_after=1)
        assert door.closed.is_set()

    asyncio.run(run())
