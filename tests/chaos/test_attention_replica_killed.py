"""The whole product with two attention replicas on the demo model: one is killed, and the client does not see it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli import Cli, free_port, metric, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPT = "def read_lines(path):\n"
TOKENS = 120


@pytest.fixture(scope="module")
def url(no_leftovers: None, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as short:
        cli = Cli(tmp_path_factory.mktemp("user"), Path(short))
        attention = {"replicas": 2, "kv_cache_gib": 0.25, "speculative_tokens": 1, "max_model_len": 1024}
        port = free_port()
        config: dict[str, Any] = {
            # float32, where no two tokens are near enough to tie, so "the same" means the same.
            "model": {"path": str(demo_model), "name": "demo", "dtype": "float32"},
            "attention": attention,
            "experts": {"workers": 2},
            "gateway": {"port": port, "grpc_port": free_port()},
        }
        cli.up(cli.write_config(config))
        yield f"http://127.0.0.1:{port}"
        cli.down()


def status(url: str) -> dict[str, Any]:
    answer = httpx.get(f"{url}/v1/deepsplit/status", timeout=30)
    found: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
    return found


def both_take_requests(url: str) -> bool:
    return len(status(url).get("gateway", {}).get("replicas", [])) == 2


def working_pid(url: str) -> int:
    """The attention replica that has a request now."""
    wait_until("a request in a replica", lambda: any(r["running"] for r in status(url)["gateway"]["replicas"]), 20)
    found = status(url)
    (busy,) = [r["id"] for r in found["gateway"]["replicas"] if r["running"]]
    pid: int = next(r["pid"] for r in found["attention"] if r["id"] == busy)
    return pid


def test_a_stream_goes_on_elsewhere_with_the_same_tokens(url: str) -> None:
    wait_until("two replicas", lambda: both_take_requests(url), 60)
    body = {
        "model": "demo", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    expected, expected_text, usage = read(url, body, None)
    assert len(expected) == TOKENS
    for _ in range(2):
        wait_until("two replicas", lambda: both_take_requests(url), 120)
        ids, text, told = read(url, body, lambda: os.kill(working_pid(url), signal.SIGKILL))
        assert (ids, text, told) == (expected, expected_text, usage)


def test_a_request_is_sent_again_before_its_first_token(url: str) -> None:
    wait_until("two replicas", lambda: both_take_requests(url), 120)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    expected = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    again = metric(url, "gateway", "deepsplit_resends_total", kind="again")
    victim = status(url)["attention"][0]["pid"]
    os.kill(victim, signal.SIGSTOP)  # it takes requests and answers none
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60) for _ in range(4)]
        wait_until("the answers of the other replica", lambda: any(one.done() for one in asked), 20)
        open_requests = sum(not one.done() for one in asked)
        os.kill(victim, signal.SIGKILL)
        answers = [one.result() for one in asked]
    assert open_requests, "no request was in flight when the replica was killed"
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected] * 4
    assert metric(url, "gateway", "deepsplit_resends_total", kind="again") > again


def read(url: str, body: dict[str, Any], once_begun: Any) -> tuple[list[int], str, dict[str, Any]]:
    """Token ids, text and usage of a stream; `once_begun` is called after its fifth event."""
    ids, text, usage, events = [], "", {}, 0
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["text"]
                ids += choice["token_ids"] or []
            events += 1
            if events == 5 and once_begun is not None:
                once_begun()
                time.sleep(0.1)
    return ids, text, usage
