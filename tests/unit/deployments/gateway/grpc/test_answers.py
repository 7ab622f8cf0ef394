"""What each of vLLM's answers becomes; the JSON is as vLLM 0.32 sends it."""

from __future__ import annotations

import json

import msgspec
import pytest
from google.protobuf.json_format import ParseError

from cluster.errors import EngineRefused
from deployments.gateway.grpc.answers import detokenize_response, message_of, models_response
from deployments.gateway.models import ModelObject
from deployments.protos.deepsplit.v1 import inference_pb2 as pb

USAGE = {
    "prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 2},
}  # fmt: skip
TYPED_USAGE = pb.Usage(prompt_tokens=9, total_tokens=12, completion_tokens=3, cached_tokens=8, reasoning_tokens=2)
HEAD = {"id": "r1", "created": 17, "model": "tiny", "system_fingerprint": None, "metrics": None}


def dump(answer: object) -> bytes:
    return json.dumps(answer).encode()


def chat_response(data: bytes) -> pb.ChatResponse:
    return message_of(data, pb.ChatResponse())


def chat_chunk(data: bytes) -> pb.ChatChunk:
    return message_of(data, pb.ChatChunk())


def completion_response(data: bytes) -> pb.CompletionResponse:
    return message_of(data, pb.CompletionResponse())


def completion_chunk(data: bytes) -> pb.CompletionChunk:
    return message_of(data, pb.CompletionChunk())


def tokenize_response(data: bytes) -> pb.TokenizeResponse:
    return message_of(data, pb.TokenizeResponse())


def test_a_chat_answer_with_everything() -> None:
    choice = {
        "index": 1,
        "message": {
            "role": "assistant", "content": None, "refusal": None, "reasoning": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
            ],
        },
        "logprobs": {
            "content": [
                {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1.5}]}
            ]
        },
        "finish_reason": "tool_calls", "stop_reason": "END", "token_ids": [4, 5],
    }  # fmt: skip
    answer = chat_response(
        dump(HEAD | {"object": "chat.completion", "choices": [choice], "usage": USAGE, "prompt_token_ids": [1, 2]})
    )
    assert answer == pb.ChatResponse(
        id="r1", model="tiny", created=17, usage=TYPED_USAGE, prompt_token_ids=[1, 2],
        choices=[
            pb.ChatChoice(
                index=1, finish_reason="tool_calls", stop_text="END", token_ids=[4, 5],
                message=pb.Message(
                    role="assistant", reasoning="hm",
                    tool_calls=[
                        pb.ToolCall(id="c1", name="f", arguments="{}", index=0),
                        pb.ToolCall(id="c2", name="g", index=1),
                    ],
                ),
                logprobs=[
                    pb.TokenLogprob(
                        token="a", logprob=-0.5, top=[pb.TokenLogprob.Alternative(token="b", logprob=-1.5)]
                    )
                ],
            )
        ],
    )  # fmt: skip
    assert not answer.choices[0].message.HasField("content")


def test_chat_chunks() -> None:
    delta = {"tool_calls": [{"index": 2, "function": {"arguments": '{"a'}}]}
    chunk = chat_chunk(dump(HEAD | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
    assert chunk.choices[0].delta == pb.Message(tool_calls=[pb.ToolCall(index=2, arguments='{"a')])
    assert not chunk.HasField("usage")
    first = chat_chunk(dump(HEAD | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
    assert first.choices[0].delta.HasField("content")
    last = chat_chunk(dump(HEAD | {"choices": [], "usage": USAGE}))
    assert (list(last.choices), last.usage) == ([], TYPED_USAGE)


def test_a_completion_with_everything() -> None:
    choice = {
        "index": 0, "text": "ab",
        "logprobs": {
            "text_offset": [0, 1], "token_logprobs": [None, -0.25], "tokens": ["a", "b"],
            "top_logprobs": [None, {"b": -0.25, "c": None}],
        },
        "finish_reason": "stop", "stop_reason": 7, "token_ids": [3, 4], "prompt_token_ids": [1],
        "prompt_logprobs": None,
    }  # fmt: skip
    data = dump(HEAD | {"choices": [choice], "usage": USAGE, "kv_transfer_params": None})
    answer = completion_response(data)
    assert answer.choices[0] == pb.CompletionChoice(
        index=0, text="ab", finish_reason="stop", stop_token_id=7, token_ids=[3, 4], prompt_token_ids=[1],
        logprobs=[
            pb.TokenLogprob(token="a"),
            pb.TokenLogprob(
                token="b", logprob=-0.25, top=[pb.TokenLogprob.Alternative(token="b", logprob=-0.25)]
            ),
        ],
    )  # fmt: skip
    assert not answer.choices[0].logprobs[0].HasField("logprob")
    assert completion_chunk(data).choices[0] == answer.choices[0]


def test_an_error_within_a_stream() -> None:
    event = dump({"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 503}})
    for read in (chat_chunk, completion_chunk):
        with pytest.raises(EngineRefused, match="engine died") as raised:
            read(event)
        assert raised.value.status == 503


def test_tokens_and_models() -> None:
    assert tokenize_response(dump({"count": 2, "max_model_len": 64, "tokens": [5, 6], "token_strs": None})) == (
        pb.TokenizeResponse(count=2, max_model_len=64, tokens=[5, 6])
    )
    assert detokenize_response(dump({"prompt": "é"})).text == "é"
    card = ModelObject(
        id="tiny", object="model", created=3, owned_by="us", root="tiny", parent=None, max_model_len=None
    )
    assert list(models_response([card, ModelObject(**card | {"max_model_len": 64})]).models) == (
        [pb.Model(id="tiny", created=3, owned_by="us", max_model_len=length) for length in (0, 64)]
    )


def test_what_no_vllm_sends() -> None:
    with pytest.raises((ParseError, msgspec.DecodeError, TypeError)):
        chat_response(b'{"choices": 3}')
