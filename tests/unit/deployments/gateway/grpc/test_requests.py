"""What each request becomes in JSON; no server."""

from __future__ import annotations

import json

import pytest
from google.protobuf.struct_pb2 import Struct

from cluster.errors import RequestError
from deployments.gateway.grpc.requests import chat_body, completion_body, detokenize_body, tokenize_body
from deployments.gateway.outline import MAX_PARTS, outline
from deployments.protos.deepsplit.v1 import inference_pb2 as pb

HELLO = [pb.Message(role="user", content="hello")]


def extra(**values: object) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


def chat(request: pb.ChatRequest, stream: bool = False) -> dict[str, object]:
    body: dict[str, object] = json.loads(chat_body(request, stream))
    return body


def test_what_is_not_set_is_not_sent() -> None:
    assert chat(pb.ChatRequest(messages=HELLO)) == {
        "messages": [{"role": "user", "content": "hello"}], "stream": False,
    }  # fmt: skip


def test_set_fields_are_sent_even_if_zero() -> None:
    sampling = pb.Sampling(temperature=0.0, top_k=0, seed=0, ignore_eos=False, max_tokens=0)
    assert chat(pb.ChatRequest(sampling=sampling)) == {
        "messages": [], "stream": False, "temperature": 0.0, "top_k": 0, "seed": 0, "ignore_eos": False,
        "max_tokens": 0,
    }  # fmt: skip


def test_a_conversation_with_tools() -> None:
    schema = '{"type": "object", "properties": {"z": {"type": "integer"}, "a": {"maximum": 12345678901234567}}}'
    call = pb.ToolCall(id="c1", name="add", arguments='{"z": 1}', index=3)
    request = pb.ChatRequest(
        model="tiny",
        messages=[
            pb.Message(role="assistant", reasoning="hm", tool_calls=[call]),
            pb.Message(role="tool", content="2", tool_call_id="c1", name="add", extra=extra(cache=True)),
        ],
        tools=[pb.Tool(name="add", description="adds", parameters=schema, strict=True)],
        tool_choice=pb.ToolChoice(function="add"),
        parallel_tool_calls=False,
        reasoning_effort="low",
    )
    body = chat(request)
    assert body == {
        "model": "tiny",
        "messages": [
            {
                "role": "assistant", "reasoning": "hm",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"z": 1}'}}
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add", "cache": True},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add", "description": "adds", "strict": True, "parameters": json.loads(schema),
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "stream": False,
    }  # fmt: skip
    assert list(json.loads(schema)["properties"]) == ["z", "a"]
    assert chat_body(request, False).index(b'"z":{') < chat_body(request, False).index(b'"a":{'), "order is kept"


def test_every_sampling_field_has_vllms_name() -> None:
    sampling = pb.Sampling(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, stop=["a", "b"], stop_token_ids=[7], seed=-3,
        n=2,
        presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={3: -100.0}, min_tokens=1,
        ignore_eos=True, logprobs=4, return_token_ids=True,
    )  # fmt: skip
    assert len(sampling.ListFields()) == len(pb.Sampling.DESCRIPTOR.fields), "a new field is tested here too"
    expected = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "stop": ["a", "b"],
        "stop_token_ids": [7], "seed": -3, "n": 2, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "repetition_penalty": 1.1, "logit_bias": {"3": -100.0}, "min_tokens": 1, "ignore_eos": True,
        "return_token_ids": True, "stream": True,
    }  # fmt: skip
    body = json.loads(completion_body(pb.CompletionRequest(text="p", sampling=sampling), stream=True))
    assert body == expected | {"prompt": "p", "logprobs": 4}
    assert chat(pb.ChatRequest(sampling=sampling), stream=True) == expected | {
        "messages": [], "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip


def test_output_formats_and_stream_options() -> None:
    wanted = pb.JsonSchema(name="n", schema='{"type": "object"}', description="d", strict=True)
    request = pb.ChatRequest(
        response_format=pb.ResponseFormat(json_schema=wanted),
        stream_options=pb.StreamOptions(include_usage=True, continuous_usage_stats=False),
        tool_choice=pb.ToolChoice(mode="required"),
    )
    assert chat(request, stream=True) == {
        "messages": [], "stream": True, "tool_choice": "required",
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "description": "d", "strict": True, "schema": {"type": "object"}},
        },
    }  # fmt: skip
    some = pb.CompletionRequest(text="", response_format=pb.ResponseFormat(json_object=True), echo=True)
    assert json.loads(completion_body(some, stream=False)) == {
        "prompt": "", "stream": False, "echo": True, "response_format": {"type": "json_object"},
    }  # fmt: skip


def test_extra_reaches_the_body_with_whole_numbers_as_integers() -> None:
    values = extra(top_n=3, part=0.5, on=True, none=None, chat_template_kwargs={"thinking": True, "list": [1, "a"]})
    body = chat_body(pb.ChatRequest(extra=values), stream=False)
    assert json.loads(body) == {
        "messages": [], "stream": False, "top_n": 3, "part": 0.5, "on": True, "none": None,
        "chat_template_kwargs": {"thinking": True, "list": [1, "a"]},
    }  # fmt: skip
    assert b'"top_n":3,' in body.replace(b"}", b",")


def test_token_ids_are_a_prompt() -> None:
    body = completion_body(pb.CompletionRequest(token_ids=pb.TokenIds(ids=[1, 2, 3])), stream=False)
    read = outline("/v1/completions", body)
    assert (read.prompt_ids, read.stream) == (3, False)


def test_tokenize_and_detokenize() -> None:
    text = pb.TokenizeRequest(model="m", text="a", add_special_tokens=False, return_token_strs=True)
    assert json.loads(tokenize_body(text)) == {
        "model": "m", "prompt": "a", "add_special_tokens": False, "return_token_strs": True,
    }  # fmt: skip
    talk = pb.TokenizeRequest(
        conversation=pb.Conversation(messages=HELLO, tools=[pb.Tool(name="t")]),
        extra=extra(add_generation_prompt=False),
    )
    assert json.loads(tokenize_body(talk)) == {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "t"}}],
        "add_generation_prompt": False,
    }
    assert json.loads(detokenize_body(pb.DetokenizeRequest(tokens=[5, 6]))) == {"tokens": [5, 6]}
    assert json.loads(detokenize_body(pb.DetokenizeRequest())) == {"tokens": []}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ChatRequest(sampling=pb.Sampling(temperature=float("nan"))), "temperature must be a finite number"),
        (pb.ChatRequest(sampling=pb.Sampling(logit_bias={1: float("inf")})), "logit_bias must be a finite number"),
        (pb.ChatRequest(extra=extra(x=float("inf"))), "extra.x must be a finite number"),
        (pb.ChatRequest(extra=extra(stream=True)), "extra.stream is set by a field of its own, or by the method"),
        (pb.ChatRequest(model="m", extra=extra(model="n")), "extra.model is set by a field of its own"),
        (pb.ChatRequest(tools=[pb.Tool(name="f", parameters="{")]), "parameters of the tool 'f' is not valid JSON"),
        (pb.ChatRequest(tools=[pb.Tool(name="f", parameters="[]")]), "parameters of the tool 'f' must be a JSON obj"),
        (
            pb.ChatRequest(response_format=pb.ResponseFormat(json_schema=pb.JsonSchema(schema="[" * 100_000))),
            "response_format.json_schema.schema is not valid JSON",
        ),
    ],
)
def test_what_json_cannot_say(request_: pb.ChatRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_body(request_, stream=False)


def many(count: int) -> Struct:
    extra = Struct()
    extra.get_or_create_list("x").extend([None] * count)
    return extra


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.ChatRequest(messages=[pb.Message()] * (MAX_PARTS + 1)), "more than 65536 objects"),
        (pb.ChatRequest(tools=[pb.Tool()] * (MAX_PARTS + 1)), "more than 65536 objects"),
        (
            pb.ChatRequest(messages=[pb.Message(tool_calls=[pb.ToolCall()] * (MAX_PARTS // 2 + 1))] * 2),
            "more than 65536 objects",
        ),
        (pb.ChatRequest(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(MAX_PARTS + 1), 1.0))), "more than 65536"),
        (pb.ChatRequest(extra=many(300_000)), "`extra` is larger than 1048576 bytes"),
        (pb.ChatRequest(messages=[pb.Message(extra=many(100_000))] * 4), "`extra` is larger than 1048576 bytes"),
    ],
    ids=["messages", "tools", "calls", "bias", "extra", "extras"],
)
def test_too_many_parts_are_refused_before_they_are_read(request_: pb.ChatRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_body(request_, stream=False)


def test_missing_prompt_and_input() -> None:
    with pytest.raises(RequestError, match="no prompt: set `text` or `token_ids`"):
        completion_body(pb.CompletionRequest(), stream=False)
    with pytest.raises(RequestError, match="no input: set `text` or `conversation`"):
        tokenize_body(pb.TokenizeRequest())
