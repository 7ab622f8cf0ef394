"""deepsplit.v1 requests to the JSON bodies that vLLM's OpenAI application takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct, Value

from cluster.errors import RequestError
from deployments.gateway.outline import MAX_PARTS, too_many_parts
from deployments.protos.deepsplit.v1 import inference_pb2 as pb

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Body: TypeAlias = dict[str, Json]

_MAX_EXTRA_BYTES = 2**20  # a Struct of many values is slow to read


def chat_body(request: pb.ChatRequest, stream: bool) -> bytes:
    """For POST /v1/chat/completions. Raises RequestError for what JSON cannot say; vLLM checks the rest."""
    body = _scalars(request) | _sampling(request.sampling)
    if isinstance(logprobs := body.pop("logprobs", None), int):
        body |= {"logprobs": True, "top_logprobs": logprobs}
    body |= _conversation(request.messages, request.tools)
    if request.tool_choice.WhichOneof("choice") == "mode":
        body["tool_choice"] = request.tool_choice.mode
    elif request.tool_choice.WhichOneof("choice") == "function":
        body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.function}}
    _add_output(body, request, stream)
    return _encoded(body, request.extra)


def completion_body(request: pb.CompletionRequest, stream: bool) -> bytes:
    """For POST /v1/completions. Raises as `chat_body` does."""
    body = _scalars(request) | _sampling(request.sampling)
    body.pop("text", None)
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
        case _:
            raise RequestError("the request has no prompt: set `text` or `token_ids`")
    _add_output(body, request, stream)
    return _encoded(body, request.extra)


def tokenize_body(request: pb.TokenizeRequest) -> bytes:
    """For POST /tokenize. Raises as `chat_body` does."""
    body = _scalars(request)
    body.pop("text", None)
    match request.WhichOneof("input"):
        case "text":
            body["prompt"] = request.text
        case "conversation":
            body |= _conversation(request.conversation.messages, request.conversation.tools)
        case _:
            raise RequestError("the request has no input: set `text` or `conversation`")
    return _encoded(body, request.extra)


def detokenize_body(request: pb.DetokenizeRequest) -> bytes:
    """For POST /detokenize."""
    return msgspec.json.encode(_scalars(request) | {"tokens": list(request.tokens)})


def _add_output(body: Body, request: pb.ChatRequest | pb.CompletionRequest, stream: bool) -> None:
    body["stream"] = stream
    if request.HasField("stream_options"):
        body["stream_options"] = _scalars(request.stream_options)
    match request.response_format.WhichOneof("format"):
        case "json_object" if request.response_format.json_object:
            body["response_format"] = {"type": "json_object"}
        case "json_schema":
            wanted = request.response_format.json_schema
            schema = json_object(wanted.schema, "response_format.json_schema.schema")
            body["response_format"] = {"type": "json_schema", "json_schema": _scalars(wanted) | {"schema": schema}}


def _sampling(sampling: pb.Sampling) -> Body:
    body = _scalars(sampling)
    if len(sampling.logit_bias) > MAX_PARTS:
        raise too_many_parts()
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): _finite(bias, "logit_bias") for token, bias in sampling.logit_bias.items()}
    return body


def _conversation(messages: Sequence[pb.Message], tools: Sequence[pb.Tool]) -> Body:
    # Asked before they are: 8 MiB of empty messages would take seconds.
    if len(messages) + len(tools) > MAX_PARTS or sum(len(one.tool_calls) for one in messages) > MAX_PARTS:
        raise too_many_parts()
    _check_extra(sum(one.extra.ByteSize() for one in messages))
    body: Body = {"messages": [_message(message) for message in messages]}
    functions: list[Json] = [_tool(tool) for tool in tools]
    if functions:
        body["tools"] = functions
    return body


def _message(message: pb.Message) -> Body:
    body = _scalars(message)
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return _with_extra(body, message.extra)


def _tool(tool: pb.Tool) -> Body:
    function = _scalars(tool)
    if tool.HasField("parameters"):
        function["parameters"] = json_object(tool.parameters, f"parameters of the tool {tool.name!r}")
    return {"type": "function", "function": function}


# --- protobuf to JSON ---


def _scalars(message: ProtoMessage) -> Body:
    """The fields that are set and are no messages, under their own names."""
    body: Body = {}
    for field, value in message.ListFields():
        if field.message_type is None:
            body[field.name] = list(value) if field.is_repeated else _finite(value, field.name)
    return body


def _finite(value: Json, name: str) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, but is {value}")
    return value


def json_object(text: str, name: str) -> Body:
    """Returns the JSON object that a text is. Raises RequestError for anything else, which it calls `name`."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a JSON object")
    return value


def _with_extra(body: Body, extra: Struct) -> Body:
    _check_extra(extra.ByteSize())
    for name, value in extra.fields.items():
        if name in body:
            raise RequestError(f"extra.{name} is set by a field of its own, or by the method: leave it out of `extra`")
        body[name] = _value(value, f"extra.{name}")
    return body


def _check_extra(size: int) -> None:
    if size > _MAX_EXTRA_BYTES:
        raise RequestError(f"`extra` is larger than {_MAX_EXTRA_BYTES} bytes, this server's limit")


def _value(value: Value, name: str) -> Json:
    match value.WhichOneof("kind"):
        case "number_value":
            number = _finite(value.number_value, name)
            assert isinstance(number, float)
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _value(part, name) for key, part in value.struct_value.fields.items()}
        case "list_value":
            return [_value(part, name) for part in value.list_value.values]
        case _:
            return None


def _encoded(body: Body, extra: Struct) -> bytes:
    return msgspec.json.encode(_with_extra(body, extra))
