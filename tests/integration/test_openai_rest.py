"""OpenAI's own client against the running application: real Serve, real vLLM."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.checkpoints import SHAPES, make_checkpoint
from tests.integration.rest_server import MAX_MODEL_LEN, RestServer, rest_server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
MESSAGES: list[Any] = [{"role": "user", "content": "def split(self"}]


@pytest.fixture(scope="module")
def server(no_leftovers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestServer]:
    with rest_server(make_checkpoint(tmp_path_factory.mktemp("mtp"), SHAPES["mtp"])) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RestServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def engine(server: RestServer) -> dict[str, float]:
    stats: dict[str, float] = httpx.get(f"{server.url}/v1/deepsplit/status", timeout=10).json()["engine"]
    return stats


def post(server: RestServer, content: str | bytes, path: str = "/v1/completions") -> tuple[int, dict[str, Any]]:
    answer = httpx.post(server.url + path, content=content, timeout=60)
    return answer.status_code, answer.json()["error"]


def test_models(client: openai.OpenAI, server: RestServer) -> None:
    (model,) = client.models.list().data
    assert model.id == server.model
    assert client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_same_streamed_or_not(client: openai.OpenAI, server: RestServer) -> None:
    whole = client.completions.create(model=server.model, prompt="class Worker", **GREEDY)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = client.completions.create(model=server.model, prompt="class Worker", stream=True, **GREEDY)
    chunks = list(stream)
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_is_the_same_streamed_or_not(client: openai.OpenAI, server: RestServer) -> None:
    whole = client.chat.completions.create(model=server.model, messages=MESSAGES, **GREEDY)
    assert whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=server.model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_fields_of_vllm_pass_through(client: openai.OpenAI, server: RestServer) -> None:
    body = {"return_token_ids": True, "logprobs": 2, "ignore_eos": True}
    answer = client.completions.create(
        model=server.model, prompt=[5, 6, 7], temperature=0, max_tokens=4, extra_body=body
    )
    assert answer.model_dump()["choices"][0]["prompt_token_ids"] == [5, 6, 7]
    assert answer.choices[0].logprobs is not None


def test_tokenize_and_back(server: RestServer) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "def f():"}, timeout=10).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}, timeout=10).json()["prompt"]
    assert text == "def f():"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert failure.value.code == "model_not_found"
    assert failure.value.param == "model"


def test_a_prompt_that_is_too_long(client: openai.OpenAI, server: RestServer) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model=server.model, prompt=[5] * (MAX_MODEL_LEN + 1), max_tokens=1)
    assert str(MAX_MODEL_LEN) in failure.value.message
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=server.model, prompt=[5] * (MAX_MODEL_LEN + 1), max_tokens=1, stream=True)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ('{"model": "tiny", "prompt": "a", "max_tokens": "many"}', 400, "max_tokens"),
        ('{"model": "tiny", "prompt": "a", "temperature": -1}', 400, "temperature"),
        ('{"model": "tiny"}', 400, "prompt"),
        ("{bad", 400, "not valid JSON"),
        (b" " * (2**20 + 1), 413, "1 MiB"),
    ],
)
def test_bad_requests(server: RestServer, content: str | bytes, status: int, message: str) -> None:
    got, error = post(server, content)
    assert got == status
    assert message in error["message"]
    assert set(error) >= {"message", "type", "param", "code"}


def test_request_ids_come_back(server: RestServer) -> None:
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "mine-1"}, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert answer.json()["id"] == "cmpl-mine-1"
    assert httpx.get(f"{server.url}/health", timeout=10).headers["x-request-id"]


def test_one_request_id_in_the_logs_of_gateway_engine_and_experts_and_no_secret(server: RestServer) -> None:
    prompt, key, request_id = "zebra_quagga", "sk-deepsplit-0123456789abcdef", "night-shift-7"
    headers = {"X-Request-Id": request_id, "Authorization": f"Bearer {key}"}
    body = {"model": server.model, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    broken = httpx.post(f"{server.url}/v1/completions", json=body | {"top_p": prompt}, headers=headers, timeout=60)
    assert broken.status_code == 400

    deadline = time.monotonic() + 10
    while len(ended := [line for line in log_lines(server, "gateway") if line.get("request_id") == request_id]) < 2:
        assert time.monotonic() < deadline, "the gateway did not log the request's end"
        time.sleep(0.1)
    good, bad = ended
    assert (good["outcome"], good["status"], good["path"]) == ("ok", 200, "/v1/completions")
    assert good["generated_tokens"] == 4
    assert good["duration_s"] > 0
    assert (bad["outcome"], bad["status"]) == ("client_error", 400)

    steps = [line for line in log_lines(server, "engine") if request_id in line.get("request_id", "")]
    assert sum(line["tokens"] for line in steps) >= 4
    assert {line["replica_id"] for line in steps} == set(good["replicas"])
    batches = [line for line in log_lines(server, "experts") if request_id in line.get("request_id", "")]
    assert {line["worker_id"] for line in batches} == {line["worker_id"] for line in log_lines(server, "experts")}
    assert {line["layer"] for line in batches} == {1, 2, 3}  # 3 is that of the drafts
    own = [line for line in log_lines(server, "attention") if line.get("logger") == "ray.serve"]
    assert any("Finished initializing replica" in line["message"] for line in own), "vLLM took the replica's log away"
    roles = {"gateway", "attention", "engine", "experts", "directory"}
    assert roles <= {str(line.get("role")) for line in log_lines(server)}

    everything = "".join(path.read_text() for path in server.logs.iterdir())
    assert prompt not in everything
    assert key not in everything


def log_lines(server: RestServer, role: str | None = None) -> list[dict[str, Any]]:
    """Every line of every process, parsed; of one role, if it is given."""
    text = "".join(path.read_text() for path in server.logs.iterdir() if path.is_file())
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if role in (None, line.get("role"))]


def test_mtp_acceptance_is_visible(client: openai.OpenAI, server: RestServer) -> None:
    client.completions.create(model=server.model, prompt="import json", **GREEDY)
    stats = engine(server)
    assert stats["spec_draft_tokens"] > 0
    assert stats["spec_acceptance"] == stats["spec_accepted_tokens"] / stats["spec_draft_tokens"]


def test_ready(server: RestServer) -> None:
    assert httpx.get(f"{server.url}/ready", timeout=10).status_code == 200


LOOP = {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/definitions/a"}}}
COMPLETION: dict[str, Any] = {"prompt": "class Worker", "max_tokens": 4}
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4}
RESPONSE: dict[str, Any] = {"input": "class Worker", "max_output_tokens": 4}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", COMPLETION | {"logprobs": 21}),
        ("/v1/completions", COMPLETION | {"allowed_token_ids": []}),
        ("/v1/completions", COMPLETION | {"prompt": [[]]}),
        ("/v1/completions", COMPLETION | {"prompt": [999_999_999]}),
        ("/v1/completions", COMPLETION | {"min_p": 0.3, "temperature": 1}),
        ("/v1/completions", COMPLETION | {"structured_outputs": {"regex": "["}}),
        ("/v1/completions", COMPLETION | {"structured_outputs": {"grammar": "root ::= root"}}),
        ("/v1/completions", COMPLETION | {"structured_outputs": {"json": LOOP}}),
        ("/v1/completions", COMPLETION | {"structured_outputs": {"json": {"type": "string", "pattern": "a\x00b"}}}),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 30}),
        ("/v1/chat/completions", CHAT | {"structured_outputs": {"json": {"allOf": [{"$ref": "#"}]}}}),
        ("/v1/responses", RESPONSE | {"top_logprobs": 50, "include": ["message.output_text.logprobs"]}),
        ("/v1/responses", RESPONSE | {"text": {"format": {"type": "json_schema", "name": "x", "schema": LOOP}}}),
        ("/v1/messages", CHAT | {"model": "tiny", "top_k": -7}),
        ("/v1/completions", COMPLETION | {"prompt": "word " * 500}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 500}]}),
        ("/v1/completions", COMPLETION | {"prompt": [7] * MAX_MODEL_LEN}),
    ],
)
def test_the_engine_refuses_a_stream_as_it_refuses_without_one(
    server: RestServer, path: str, fields: dict[str, Any]
) -> None:
    def asked(stream: bool) -> tuple[int, bytes, str]:
        answer = httpx.post(server.url + path, json={**fields, "stream": stream}, timeout=30)
        return answer.status_code, answer.content, answer.headers["content-type"]

    whole = asked(stream=False)
    assert whole[0] == 400, whole
    started = time.monotonic()
    assert asked(stream=True) == whole
    assert time.monotonic() - started < 1.5  # no other replica was waited for
    assert "Internal" not in whole[1].decode()
    assert httpx.get(f"{server.url}/ready", timeout=10).status_code == 200
