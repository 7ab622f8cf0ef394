"""The REST application: what reaches a replica of a request, and what a client gets of its end."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from cluster.errors import (
    DeepsplitError,
    Draining,
    ModelNotFound,
    Overloaded,
    Plane,
    QuotaExceeded,
    RateLimits,
    Reason,
    ReplicaUnavailable,
    RequestTimeout,
    StreamLost,
    Unauthenticated,
)
from deployments.gateway.head import MAX_ID_CHARS
from tests.unit.deployments.gateway.gateway_world import COMPLETIONS, SSE, FakePool, run, stream, text_of
from tests.unit.deployments.gateway.rest.rest_world import (
    ANSWER,
    CREATED,
    GUEST_KEY,
    OPERATOR_KEY,
    REPLY,
    RestWorld,
    body_of,
    endless,
    get,
    keys_file,
    post,
    request,
)

POST_PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize",
    "/v1/messages/count_tokens",
)  # fmt: skip
SECRET = {"authorization": f"Bearer {OPERATOR_KEY}"}


@pytest.mark.parametrize("path", POST_PATHS)
def test_a_request_reaches_a_replica_as_it_came_and_its_answer_the_client(path: str) -> None:
    world = RestWorld(FakePool(ANSWER))
    answer = post(world, {"model": "tiny", "field_of_tomorrow": [1, "é"]}, path, {"x-request-id": "r1"})
    assert (answer.status_code, answer.content) == (200, REPLY)
    ((_, seen_path, seen_body),) = world.pool.seen
    assert (seen_path, seen_body) == (path, answer.request.content)
    assert world.pool.headers == [{"x-request-id": "r1"}]
    assert answer.headers["x-request-id"] == "r1"


def test_nothing_of_the_body_is_rewritten() -> None:
    body = '{ "model": "tiny",\n "prompt": "é", "field_of_tomorrow": [1, 2] }'.encode()
    world = RestWorld(FakePool(ANSWER))
    post(world, body)
    assert world.pool.seen[0][2] == body


def test_class_and_deadlines_come_from_headers() -> None:
    world = RestWorld(FakePool(ANSWER))
    assert post(world, headers={"x-deepsplit-priority": "batch"}).status_code == 200
    labels = {"outcome": "ok", "class": "batch", "tenant": "anonymous"}
    assert world.value("deepsplit_requests_total", **labels) == 1

    pool = FakePool([SSE, *stream("wxyz")])
    pool.hold = asyncio.Event()
    late = post(RestWorld(pool), {"stream": True}, headers={"x-deepsplit-timeout-s": "0.1"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
    hasty = post(RestWorld(FakePool(ANSWER)), headers={"x-deepsplit-ttft-s": "1e-9"})
    assert (hasty.status_code, hasty.json()["error"]["reason"]) == (429, "deadline")


def test_without_headers() -> None:
    world = RestWorld(FakePool(ANSWER))
    made = post(world).headers["x-request-id"]
    assert len(made) == 32
    assert world.pool.headers == [{"x-request-id": made}]


@pytest.mark.parametrize("headers", [SECRET, {"x-api-key": OPERATOR_KEY}, {"authorization": f"bearer {OPERATOR_KEY} "}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_keys_come_in_either_header(path: str, headers: dict[str, str], tmp_path: Path) -> None:
    world = RestWorld(FakePool(ANSWER), keys_file(tmp_path))
    assert post(world, path=path, headers=headers).status_code == 200
    assert post(world, path=path).status_code == 401


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/v1/models/tiny", "/v1/models/other", "/nowhere"])
@pytest.mark.parametrize("asked", ["r" * 5000, "a\tb", "é", " ", "x" * MAX_ID_CHARS])
def test_a_request_id_is_bounded_and_clean_everywhere(path: str, asked: str) -> None:
    world = RestWorld(FakePool(ANSWER))
    method = "POST" if path == "/v1/completions" else "GET"
    content = b'{"prompt": "a"}' if method == "POST" else None
    shown = request(world, method, path, {"x-request-id": asked.encode("latin-1")}, content).headers["x-request-id"]  # type: ignore[dict-item]
    assert shown == asked[:MAX_ID_CHARS] if asked.startswith(("r", "x")) else len(shown) == 32
    assert all(headers["x-request-id"] == shown for headers in world.pool.headers)


def test_the_place_in_a_trace_is_passed_on_and_the_key_is_not(tmp_path: Path) -> None:
    world = RestWorld(FakePool(ANSWER), keys_file(tmp_path))
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
    post(world, headers={**SECRET, **trace, "x-request-id": "r1", "cookie": "c", "baggage": "b"})
    assert world.pool.headers == [{**trace, "x-request-id": "r1"}]
    world.pool.scripts = [ANSWER]
    post(world, headers={**SECRET, "traceparent": "0" * 5000, "x-request-id": "r2"})
    assert world.pool.headers[1:] == [{"x-request-id": "r2"}]


@pytest.mark.parametrize("name", ["x-deepsplit-timeout-s", "x-deepsplit-ttft-s"])
@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", ""])
def test_a_deadline_that_is_no_number(name: str, value: str) -> None:
    answer = post(RestWorld(FakePool()), headers={name: value})
    assert answer.status_code == 400
    assert f"{name} must be a number of seconds above 0" in answer.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_bound_is_not_read_on(declared: bool) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(), max_body_mib=1)
        async with world.client() as http:
            content = b" " * (2**20 + 1) if declared else endless()
            answer = await http.post(COMPLETIONS, content=content)
        assert answer.status_code == 413
        assert "larger than 1 MiB" in answer.json()["error"]["message"]
        assert world.nothing_left()

    run(scenario)


def test_a_strangers_body_is_not_read(tmp_path: Path) -> None:
    read = 0

    async def pieces() -> AsyncGenerator[bytes, None]:
        nonlocal read
        read += 1
        yield b"{}"

    async def scenario() -> None:
        async with world.client() as http:
            answer = await http.post(COMPLETIONS, content=pieces(), headers={"x-api-key": "wrong"})
            assert answer.status_code == 401
            world.pipeline.open_requests.draining = True
            assert (await http.post(COMPLETIONS, content=pieces(), headers=SECRET)).status_code == 503

    world = RestWorld(FakePool(), keys_file(tmp_path))
    run(scenario)
    assert (read, world.pool.seen) == (0, [])


def test_many_bodies_at_once_are_refused_and_their_memory_comes_back() -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(*[ANSWER] * 8), max_body_mib=1, max_bodies_mib=2)
        go_on = asyncio.Event()

        async def slow() -> AsyncGenerator[bytes, None]:
            yield b'{"prompt": "a",' + b" " * (2**20 - 100)
            await go_on.wait()
            yield b'"n": 1}'

        async with world.client() as http:
            held = [asyncio.create_task(http.post(COMPLETIONS, content=slow())) for _ in range(2)]
            while world.pipeline._memory.held_bytes < 2 * (2**20 - 100):
                await asyncio.sleep(0.01)
            refused = await http.post(COMPLETIONS, content=b'{"prompt": "' + b"a" * 1000 + b'"}')
            error = refused.json()["error"]
            assert (refused.status_code, error["reason"], error["plane"]) == (429, "bodies", "gateway")
            assert "gateway.max_bodies_mib" in error["message"]
            assert int(refused.headers["retry-after"]) >= 1
            go_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]
            assert world.nothing_left()
            assert (await http.post(COMPLETIONS, content=b'{"prompt": "a"}')).status_code == 200

    run(scenario)


BUSY = Overloaded("busy", retry_after_s=1.2, plane=Plane.EXPERTS, reason=Reason.TTFT)
LIMITS = RateLimits(100, 0, 6.0, 5000, 40, 30.5)


@pytest.mark.parametrize(
    ("error", "status", "kind", "headers"),
    [
        (Unauthenticated("no key"), 401, "authentication_error", {"www-authenticate": "Bearer"}),
        (ModelNotFound("no such model"), 404, "not_found_error", {}),
        (BUSY, 429, "rate_limit_error", {"retry-after": "2", "retry-after-ms": "1200"}),
        (
            QuotaExceeded("used up", retry_after_s=0.2, plane=Plane.QUOTA, reason=Reason.TOKENS_PER_MINUTE,
                          limits=LIMITS), 429,
            "rate_limit_error",
            {
                "retry-after": "1", "x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "6.0s", "x-ratelimit-remaining-tokens": "40",
            },
        ),
        (
            QuotaExceeded("never", retry_after_s=math.inf, plane=Plane.QUOTA, reason=Reason.TOKENS_PER_MINUTE), 429,
            "rate_limit_error",
            {"x-should-retry": "false"},
        ),
        (
            Draining("bye", retry_after_s=2, plane=Plane.GATEWAY, reason=Reason.DRAINING),
            503,
            "server_error",
            {"retry-after": "2", "connection": "close"},
        ),
        (RequestTimeout("slow"), 504, "server_error", {"x-should-retry": "false"}),
        (ReplicaUnavailable("gone"), 503, "server_error", {"retry-after": "2"}),
    ],
)  # fmt: skip
def test_errors_in_openais_shape(error: DeepsplitError, status: int, kind: str, headers: dict[str, str]) -> None:
    answer = post(RestWorld(FakePool([error]), max_resends=0))
    assert answer.status_code == status
    body = answer.json()["error"]
    assert (body["message"], body["type"], body["code"]) == (str(error), kind, error.outcome)
    assert {name: answer.headers[name] for name in headers} == headers


def test_a_refusal_names_the_plane() -> None:
    assert post(RestWorld(FakePool([BUSY]))).json()["error"]["plane"] == "experts"


def test_errors_in_anthropics_shape() -> None:
    body = post(RestWorld(FakePool([BUSY])), path="/v1/messages").json()
    assert body == {"type": "error", "error": {"type": "rate_limit_error", "message": "busy"}}


@pytest.mark.parametrize(
    ("path", "first_line"),
    [("/v1/completions", b"data: "), ("/v1/responses", b"event: error"), ("/v1/messages", b"event: error")],
)
def test_a_stream_that_fails_ends_with_the_error_and_without_done(path: str, first_line: bytes) -> None:
    delta = b'data: {"type": "content_block_delta", "delta": {"text": "%d"}}\n\n'
    chunks = [delta % i for i in range(2)] if path != COMPLETIONS else stream("wx")[:2]
    world = RestWorld(FakePool([SSE, *chunks, StreamLost("cannot go on")]))
    answer = post(world, {"stream": True}, path)
    assert answer.status_code == 200
    *head, last, empty = answer.content.split(b"\n\n")
    assert (len(head), empty) == (2, b"")
    assert last.startswith(first_line)
    assert b"cannot go on" in last
    assert b"[DONE]" not in answer.content
    assert world.pool.closed == 1


def test_streams_may_not_be_buffered() -> None:
    answer = post(RestWorld(FakePool([SSE, *stream("wxyz")])), {"stream": True})
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-cache")
    assert answer.headers["content-type"] == SSE.content_type
    assert text_of(answer.content) == "wxyz"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/embeddings", "/docs", "/v1/messages/batches", "/", "//metrics", "/health//"]
)
def test_unknown_paths(path: str, method: str) -> None:
    answer = request(RestWorld(FakePool()), method, f"http://gateway{path}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert path.rstrip("/") in error["message"]
    if path.startswith("/v1/messages"):
        assert answer.json() == {"type": "error", "error": {"type": "not_found_error", "message": error["message"]}}
    else:
        assert error["code"] == "not_found"


def test_wrong_method() -> None:
    answer = get(RestWorld(FakePool()), COMPLETIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"
    anthropic = get(RestWorld(FakePool()), "/v1/messages")
    assert (anthropic.status_code, anthropic.json()["type"]) == (405, "error")


def test_odd_paths_without_a_key_make_no_series(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world.client() as http:
            for number in range(250):
                assert (await http.get(f"/v1/models/{number}")).status_code == 401
                assert (await http.post(f"/nowhere/{number}")).status_code == 404
                await http.request("PUT", f"/v1/models/{number}")
                await http.post(f"/v1/completions/{number}", content=b"{}")

    world = RestWorld(FakePool(), keys_file(tmp_path))
    run(scenario)
    labels = {value for metric in world.registry.collect() for s in metric.samples for value in s.labels.values()}
    assert not [value for value in labels if "/" in value and value != "/v1/models/{model}"]
    assert world.value("deepsplit_other_requests_total", path="/v1/models/{model}", outcome="unauthenticated") == 250


def test_health_readiness_status_and_document() -> None:
    world, sick = RestWorld(FakePool()), RestWorld(FakePool(names=""))
    assert [get(sick, path).status_code for path in ("/health", "/ping", "/ready")] == [200, 200, 503]
    assert (get(world, "/ready").status_code, get(world, "/ready").json()) == (200, {"models": {"tiny": True}})
    assert get(world, "/v1/deepsplit/status").json() == {"model": "tiny"}
    assert get(world, "/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize("path", ["/v1/deepsplit/status", "/metrics", "/sd/prometheus"])
def test_operator_pages_are_for_operators(path: str, tmp_path: Path) -> None:
    world = RestWorld(FakePool(), keys_file(tmp_path))
    assert get(world, path, SECRET).status_code == 200
    assert get(world, path, {"authorization": "Bearer wrong"}).status_code == 401
    refused = get(world, path, {"authorization": f"Bearer {GUEST_KEY}"})
    assert refused.status_code == 403
    assert "operator: true" in refused.json()["error"]["message"]


def test_metrics_and_discovery_as_prometheus_reads_them() -> None:
    metrics = get(RestWorld(FakePool()), "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert 'deepsplit_waiting_requests{class="batch"} 0.0' in metrics.text
    assert get(RestWorld(FakePool()), "/sd/prometheus").json() == [{"targets": []}]


def test_versions() -> None:
    world = RestWorld(FakePool())
    pages, world.engine_pages = world.engine_pages, {}
    assert get(world, "/version").json() == {"version": "1.2"}
    world.engine_pages = pages
    assert get(world, "/version").json() == {"version": "1.2", "vllm": "0.9"}
    world.engine_pages = {}  # it has been asked
    assert get(world, "/version").json() == {"version": "1.2", "vllm": "0.9"}


# --- models: answered here, never by a replica ---

SHOWN = {"object": "model", "created": CREATED, "owned_by": "deepsplit", "root": "org/big", "parent": None}


def test_list_and_retrieve_agree() -> None:
    world = RestWorld(FakePool(max_model_len=4096), models=("org/big", "small"))
    listed = get(world, "/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"] == [SHOWN | {"id": name, "max_model_len": 4096} for name in ("org/big", "small")]
    for path, model in (("org/big", 0), ("org%2Fbig", 0), ("org%2fbig/", 0), ("small", 1), ("sm%61ll", 1)):
        assert get(world, f"/v1/models/{path}").json() == listed["data"][model]
    assert world.pool.seen == []


@pytest.mark.parametrize(
    "model", ["other", "org", "big", "%2e%2e/%2e%2e/metrics", "..%2f..%2fmetrics", "..;/metrics", "%5c..",
              "org%252Fbig", "ORG/BIG", "%00"],
)  # fmt: skip
def test_an_unknown_model_is_not_found(model: str) -> None:
    answer = get(RestWorld(FakePool(), models=("org/big", "small")), f"/v1/models/{model}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "does not exist; this server has 'org/big'" in error["message"]


def test_a_tenant_sees_only_its_models(tmp_path: Path) -> None:
    world = RestWorld(FakePool(), keys_file(tmp_path))
    guest = {"authorization": f"Bearer {GUEST_KEY}"}
    assert get(world, "/v1/models", guest).json() == {"object": "list", "data": []}
    assert get(world, "/v1/models/tiny", guest).status_code == 404
    assert get(world, "/v1/models/tiny").status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_a_body(path: str) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool())
        async with world.served() as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            asked, got = await http.head(path), await http.get(path)
            assert (asked.status_code, asked.content) == (200, b"")
            for name in ("content-type", "content-length"):
                assert asked.headers[name] == got.headers[name]
            assert (await http.head("/v1/models/other")).status_code == 404

    run(scenario)


@pytest.mark.parametrize("path", [*POST_PATHS, "/v1/models", "/v1/models/tiny", "/health", "/version"])
def test_a_slash_at_the_end_changes_nothing(path: str) -> None:
    world = RestWorld(FakePool(ANSWER))
    answer = post(world, body_of(path), f"{path}/") if path in POST_PATHS else get(world, f"{path}/")
    assert answer.status_code == 200
    assert [seen for _, seen, _ in world.pool.seen] == ([path] if path in POST_PATHS else [])


@pytest.mark.parametrize("model", ["", "tiny", "alias", None])
@pytest.mark.parametrize("path", POST_PATHS)
def test_an_empty_name_and_every_alias_are_the_one_model(path: str, model: str | None) -> None:
    world = RestWorld(FakePool(ANSWER), models=("tiny", "alias"))
    assert post(world, {"model": model}, path).status_code == 200
    named = model or "tiny" if path == "/v1/messages" else model  # whose engine asks for a name
    assert json.loads(world.pool.seen[0][2])["model"] == named
    wrong = post(world, {"model": "other"}, path)
    assert wrong.status_code == 404
    if not path.startswith("/v1/messages"):
        assert (wrong.json()["error"]["code"], wrong.json()["error"]["param"]) == ("model_not_found", "model")
