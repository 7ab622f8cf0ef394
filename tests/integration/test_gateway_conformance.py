"""Clients that we did not write against the running application: Node's openai, curl, reflection, OIP, schemathesis."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from tests.checkpoints import SHAPES, make_checkpoint
from tests.integration import openapi_check
from tests.integration.node_client import NodeClient
from tests.integration.reflection_client import ReflectionClient
from tests.integration.rest_server import RestServer, rest_server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(no_leftovers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestServer]:
    with rest_server(make_checkpoint(tmp_path_factory.mktemp("mtp"), SHAPES["mtp"])) as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> NodeClient:
    return NodeClient(tmp_path_factory.mktemp("node"))


@pytest.fixture
def reflected(server: RestServer) -> Iterator[ReflectionClient]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield ReflectionClient(channel)


def curl(*arguments: str, body: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """`curl` with its verbose log on stderr."""
    command = ["curl", "--silent", "--verbose", "--max-time", "60", *arguments]
    return subprocess.run(command, input=body, capture_output=True, check=False, timeout=90)


def completion(server: RestServer, **fields: Any) -> bytes:
    return json.dumps({"model": server.model, "prompt": "class Worker"} | GREEDY | fields).encode()


# --- Node ---


def test_node_reads_whole_and_streamed_answers(server: RestServer, node: NodeClient) -> None:
    seen = node.run("answers", server.url, server.model)
    assert seen["models"] == [server.model]
    assert seen["text"] == seen["chat"] != ""
    assert seen["streamed"] == seen["completion"] != ""
    assert (seen["finish"], seen["usage"]) == ("length", GREEDY["max_tokens"])
    assert seen["chunks"] > 3
    assert seen["id"]


def test_node_raises_its_own_error_classes(server: RestServer, node: NodeClient) -> None:
    seen = node.run("errors", server.url, server.model)
    assert {name: (error["kind"], error["status"]) for name, error in seen.items()} == {
        "unknownModel": ("NotFoundError", 404),
        "badField": ("BadRequestError", 400),
        "badFieldStreamed": ("BadRequestError", 400),
        "unknownPath": ("NotFoundError", 404),
    }
    assert (seen["unknownModel"]["code"], seen["unknownModel"]["param"]) == ("model_not_found", "model")
    assert "temperature" in seen["badField"]["message"]


def test_node_leaves_a_stream(server: RestServer, node: NodeClient) -> None:
    assert node.run("abort", server.url, server.model)["chunks"] >= 3
    wait_until_idle(server)


# --- curl ---


def test_curl_sees_each_token_as_it_comes(server: RestServer) -> None:
    command = ["curl", "--silent", "--no-buffer", "--http1.1", "--data-binary", "@-", f"{server.url}/v1/completions"]
    reads: list[bytes] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(completion(server, stream=True, max_tokens=40))
        process.stdin.close()
        while data := os.read(process.stdout.fileno(), 65536):
            reads.append(data)
    events = [event for event in b"".join(reads).split(b"\n\n") if event.startswith(b"data: {")]
    assert process.returncode == 0
    # With drafting two tokens may share an event; the reader may be late now and then, so not every read is one event.
    assert len(events) >= 20
    assert len(reads) >= 0.7 * len(events)


def test_curl_is_told_to_go_on(server: RestServer) -> None:
    done = curl(
        "--http1.1", "--header", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@-",
        f"{server.url}/v1/completions", body=completion(server),
    )  # fmt: skip
    log = done.stderr.decode()
    assert log.index("HTTP/1.1 100 Continue") < log.index("HTTP/1.1 200 OK")
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == GREEDY["max_tokens"]


def test_curl_does_not_send_a_body_that_is_too_large(server: RestServer) -> None:
    done = curl(
        "--http1.1", "--header", "Expect: 100-continue", "--expect100-timeout", "30", "--data-binary", "@-",
        f"{server.url}/v1/completions", body=b" " * (2**20 + 1),
    )  # fmt: skip
    log = done.stderr.decode()
    assert "HTTP/1.1 413" in log
    assert "100 Continue" not in log
    assert json.loads(done.stdout)["error"]["code"] == "too_large"


def test_curl_keeps_its_connection(server: RestServer) -> None:
    url = f"{server.url}/v1/models"
    log = curl("--http1.1", url, "--output", os.devnull, url).stderr.decode()
    assert log.count("HTTP/1.1 200 OK") == 2
    assert log.count("Connected to") == 1


# --- gRPC, as a client without our stubs sees it ---


def test_reflection_lists_and_describes(reflected: ReflectionClient) -> None:
    ours = "deepsplit.v1.Inference"
    assert {"grpc.health.v1.Health", "inference.GRPCInferenceService", ours} <= set(reflected.services())
    assert {"Chat", "ChatStream", "Complete", "CompleteStream", "Tokenize"} <= set(reflected.methods(ours))


def test_reflection_is_enough_to_ask_for_health(reflected: ReflectionClient, server: RestServer) -> None:
    for service in ("", server.model):
        (answer,) = reflected.call("grpc.health.v1.Health", "Check", {"service": service})
        assert answer == {"status": "SERVING"}


# --- the document ---


def test_the_document_holds_what_it_says(server: RestServer) -> None:
    before = httpx.get(f"{server.url}/v1/deepsplit/status", timeout=10).json()
    checked = openapi_check.check(server.url, server.model, examples=12)
    assert checked.requests > 100
    assert checked.failures == {}
    wait_until_idle(server)
    after = httpx.get(f"{server.url}/v1/deepsplit/status", timeout=10).json()
    assert processes(after) == processes(before)


def processes(status: dict[str, Any]) -> list[int]:
    return [process["pid"] for plane in ("attention", "experts") for process in status[plane]]


def wait_until_idle(server: RestServer) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = httpx.get(f"{server.url}/v1/deepsplit/status", timeout=10).json()["gateway"]
        if status["tickets"] == 0 and all(r["running"] + r["waiting"] == 0 for r in status["replicas"]):
            return
        time.sleep(0.1)
    raise AssertionError(f"still busy: {status}")
