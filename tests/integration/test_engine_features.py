"""What this vLLM can do reaches clients through the gateway as it is: official clients, real Serve, real vLLM."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anthropic
import grpc
import httpx
import openai
import pytest

from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.checkpoints import SHAPES, make_checkpoint
from tests.integration.rest_server import MAX_MODEL_LEN, RestServer, rest_server
from tests.tiny_tokenizer import add_tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

MESSAGES: list[Any] = [{"role": "user", "content": "def split(self"}]
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"],
           "additionalProperties": False}  # fmt: skip
PAINT: Any = {"type": "function", "function": {"name": "paint", "parameters": COLOURS, "strict": True}}
LONG = MAX_MODEL_LEN - 16  # tokens
SEQUENCES = 8


@pytest.fixture(scope="module")
def server(no_leftovers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("mtp"), SHAPES["mtp"])
    add_tokens(checkpoint, "<think>", "</think>")
    parsers = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_v3"}
    with rest_server(checkpoint, parsers) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RestServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


# --- chat and completions ---


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(client: openai.OpenAI, server: RestServer, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOURS}}
    asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "response_format": wanted, "temperature": 0}
    if stream:
        chunks = client.chat.completions.create(stream=True, **asked)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content or ""
    assert json.loads(text)["colour"] in ("red", "green")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(client: openai.OpenAI, server: RestServer, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "paint"}}
    asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "tools": [PAINT], "tool_choice": choice,
                             "temperature": 0, "max_tokens": 100}  # fmt: skip
    name = arguments = ""
    if stream:
        for chunk in client.chat.completions.create(stream=True, **asked):
            for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
                assert call.function is not None
                name, arguments = name + (call.function.name or ""), arguments + (call.function.arguments or "")
    else:
        (made,) = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
        assert made.type == "function"
        name, arguments = made.function.name, made.function.arguments
    assert name == "paint"
    assert json.loads(arguments)["colour"] in ("red", "green")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_content(client: openai.OpenAI, server: RestServer, stream: bool) -> None:
    """As DeepSeek-V3.1 thinks: what comes before `</think>` is reasoning, if the template is told to let it think."""

    def answer(thinking: bool) -> tuple[str, str]:
        extra = {"chat_template_kwargs": {"thinking": thinking}, "ignore_eos": True}
        asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0,
                                 "extra_body": extra}  # fmt: skip
        if not stream:
            message = client.chat.completions.create(**asked).choices[0].message
            return message.content or "", getattr(message, "reasoning", None) or ""
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **asked)]
        content = "".join(delta.content or "" for delta in deltas)
        return content, "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)

    said, thought = answer(thinking=False)
    assert said
    assert not thought
    assert answer(thinking=True) == ("", said)


def test_choices_log_probabilities_stop_and_seed(client: openai.OpenAI, server: RestServer) -> None:
    asked: dict[str, Any] = {"model": server.model, "prompt": "class Worker", "max_tokens": 12,
                             "extra_body": {"ignore_eos": True}}  # fmt: skip
    several = client.completions.create(temperature=1.0, n=3, logprobs=2, **asked).choices
    assert [one.index for one in several] == [0, 1, 2]
    assert len({one.text for one in several}) > 1
    assert several[0].logprobs is not None
    assert len(several[0].logprobs.token_logprobs or []) == 12
    # Only the first token: with MTP drafts this vLLM does not repeat the rest of a seeded sample.
    short = asked | {"max_tokens": 1, "temperature": 1.0}
    first, again = (
        [client.completions.create(seed=seed, **short).choices[0].text for seed in range(8)] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1
    text = client.completions.create(temperature=0, **asked).choices[0].text
    stop = next(text[at : at + 2] for at in range(1, len(text) - 1) if text[at : at + 2].isascii())
    cut = client.completions.create(temperature=0, stop=[stop], **asked).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")


def test_usage_in_every_chunk(client: openai.OpenAI, server: RestServer) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=server.model, prompt="class Worker", max_tokens=6, stream=True, stream_options=options,
            extra_body={"ignore_eos": True},
        )
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 6


# --- the other two APIs ---


def test_responses(client: openai.OpenAI, server: RestServer) -> None:
    whole = client.responses.create(model=server.model, input="def split(", max_output_tokens=12, temperature=0)
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens <= 12
    kinds, text = [], ""
    for event in client.responses.create(
        model=server.model, input="def split(", max_output_tokens=12, temperature=0, stream=True
    ):
        kinds.append(event.type)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text == whole.output_text


def test_messages(server: RestServer) -> None:
    asked: dict[str, Any] = {"model": server.model, "max_tokens": 12, "messages": MESSAGES,
                             "extra_body": {"temperature": 0}}  # fmt: skip
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as claude:
        whole = claude.messages.create(**asked)
        assert 0 < whole.usage.output_tokens <= 12
        with claude.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
        assert claude.messages.count_tokens(model=server.model, messages=MESSAGES).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(**asked | {"model": "other"})
    (block,) = whole.content
    assert block.type == "text"
    assert text == block.text


# --- clients that leave ---


def status(server: RestServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/deepsplit/status", timeout=10).json()
    return found


async def seconds_until(server: RestServer, busy: bool) -> float:
    """Until the one replica holds KV blocks or, if not `busy`, none; every other count must fit."""
    begun_s = time.monotonic()
    while time.monotonic() < begun_s + 10:
        now = await asyncio.to_thread(status, server)
        (replica,) = now["gateway"]["replicas"]
        counts = (now["gateway"]["tickets"], replica["running"], replica["kv_cache_usage"], now["engine"]["running"])
        if all(counts) if busy else not any(counts):
            return time.monotonic() - begun_s
        await asyncio.sleep(0.02)
    raise AssertionError(f"after 10 s: {now}")


@asynccontextmanager
async def rest(server: RestServer, stream: bool) -> AsyncIterator[None]:
    """A client with a request that generates; leaving the block goes away from it."""
    body = {"model": server.model, "prompt": "def split(", "max_tokens": LONG, "n": SEQUENCES, "ignore_eos": True,
            "stream": stream}  # fmt: skip
    async with httpx.AsyncClient(timeout=60) as http:
        asking = asyncio.create_task(http.post(f"{server.url}/v1/completions", json=body))
        try:
            yield
            assert not asking.done()
        finally:
            asking.cancel()


@asynccontextmanager
async def rpc(server: RestServer, stream: bool) -> AsyncIterator[None]:
    """The same over gRPC."""
    sampling = pb.Sampling(max_tokens=LONG, n=SEQUENCES, ignore_eos=True)
    request = pb.CompletionRequest(model=server.model, text="def split(", sampling=sampling)
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = InferenceStub(channel)
        call = stub.CompleteStream(request) if stream else stub.Complete(request)
        reading = asyncio.ensure_future(call.read() if stream else call)
        try:
            yield
            assert not call.done()
        finally:
            call.cancel()
            await asyncio.wait((reading,))


Leaver = Callable[[RestServer, bool], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("client_of", [rest, rpc])
def test_a_client_that_leaves_frees_its_kv_blocks_within_a_second(
    server: RestServer, client_of: Leaver, stream: bool, record_property: Callable[[str, object], None]
) -> None:
    async def leave() -> float:
        before = (await asyncio.to_thread(status, server))["engine"]["generation_tokens"]
        async with client_of(server, stream):
            await seconds_until(server, busy=True)
        took_s = await seconds_until(server, busy=False)
        after = (await asyncio.to_thread(status, server))["engine"]["generation_tokens"]
        assert after - before < SEQUENCES * LONG, "it ended by itself"
        return took_s

    async def thrice() -> list[float]:
        return [await leave() for _ in range(3)]

    taken_s = run(thrice())
    record_property("seconds", taken_s)
    print(f"freed after {taken_s} s")
    # What is measured has the status page's own delay in it, and a busy machine's: the best of three counts.
    assert min(taken_s) < 1.0


def test_a_grpc_deadline_aborts_and_frees(server: RestServer) -> None:
    async def late() -> grpc.StatusCode:
        sampling = pb.Sampling(max_tokens=LONG, n=SEQUENCES, ignore_eos=True)
        request = pb.CompletionRequest(model=server.model, text="def split(", sampling=sampling)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await InferenceStub(channel).Complete(request, timeout=0.4)
        await seconds_until(server, busy=False)
        return raised.value.code()

    assert run(late()) is grpc.StatusCode.DEADLINE_EXCEEDED


def run(scenario: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(scenario, 120)

    return asyncio.run(bounded())
