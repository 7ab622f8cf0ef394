"""Request lines as no client library sends them, over a real socket: none reaches a page that no route names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.deployments.gateway.gateway_world import FakePool, run
from tests.unit.deployments.gateway.rest.rest_world import ANSWER, OPERATOR_KEY, RestWorld, body_of, keys_file

UP = (
    "..", "%2e%2e", "%2E%2e", ".%2e", "..;", "..%00", "%252e%252e", "..%5c", "..\\", "%c0%ae%c0%ae", "..?", "..#", "",
    ".",
)  # fmt: skip
BETWEEN = ("/", "%2F", "%2f", "//", "/./", "\\", "%5C", ";/", "%252f")
PRIVATE = ("metrics", "deepsplit/load", "sleep", "load", "server_info", "v1/load_lora_adapter", "sd/prometheus")


async def talk(port: int, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer to exactly this request line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\nx-api-key: {OPERATOR_KEY}\r\nconnection: close\r\n"
    writer.write(head.encode("latin-1") + b"content-length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("page", PRIVATE)
def test_no_way_round_leads_from_models_to_another_page(page: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(*[ANSWER] * 1000), keys_file(tmp_path))
        async with world.served() as port:
            for up in UP:
                for between in BETWEEN:
                    target = f"/v1/models/{up}{between}{up}{between}{page}"
                    status, body = await talk(port, "GET", target)
                    # `..?` and `..#` end the path: what is before them is a model's name.
                    assert status in (400, 404), f"{target}: {status} {body[:60]!r}"
                    assert b"deepsplit_" not in body
                    assert b"targets" not in body
        assert world.pool.seen == []

    run(scenario)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
def test_nothing_but_the_routes_own_paths_is_ever_sent_to_a_replica(method: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(*[ANSWER] * 1000), keys_file(tmp_path))
        async with world.served() as port:
            for path in ("/v1/completions", "/v1/messages", "/tokenize"):
                for up in UP:
                    for between in BETWEEN:
                        target = f"{path}{between}{up}{between}sleep"
                        await talk(port, method, target, body_of(path) if method == "POST" else b"")
        sent = {path for _, path, _ in world.pool.seen}
        assert sent <= {"/v1/completions", "/v1/messages", "/tokenize"}

    run(scenario)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/completions", 200), ("/v1/completions/", 200), ("/v1/completions?a=../../sleep", 200),
        ("/%76%31/completions", 200), ("http://other/v1/completions", 200), ("/v1%2Fcompletions", 200),
        ("/v1//completions", 404), ("//v1/completions", 404), ("/v1/./completions", 404), ("/V1/completions", 404),
        ("/v1/completions;a=b", 404), ("/v1/completions/x", 404), ("/v1/x/../completions", 404),
        ("v1/completions", 400), ("*", 404), ("http://other", 400), ("/v1/completions\\", 404),
    ],
)  # fmt: skip
def test_spellings_of_a_path(target: str, status: int, tmp_path: Path) -> None:
    async def scenario() -> None:
        world = RestWorld(FakePool(ANSWER), keys_file(tmp_path))
        async with world.served() as port:
            assert (await talk(port, "POST", target, body_of("/v1/completions")))[0] == status
        assert [path for _, path, _ in world.pool.seen] == (["/v1/completions"] if status == 200 else [])

    run(scenario)
