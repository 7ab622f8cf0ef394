"""vLLM's JSON answers to deepsplit.v1 messages: fields of the same name, and the few that are shaped differently.

What vLLM sends beyond the messages' fields is dropped. All functions raise EngineRefused for an event that is an error,
and ParseError, msgspec.DecodeError or TypeError for what no vLLM sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from cluster.errors import EngineRefused
from deployments.gateway.models import ModelObject
from deployments.protos.deepsplit.v1 import inference_pb2 as pb

Json = dict[str, Any]
M = TypeVar("M", bound=Message)

_OBJECT = msgspec.json.Decoder(dict)


def message_of(data: bytes, message: M) -> M:
    """Fills a message from an answer, or from one event of a stream, and returns it."""
    answer: Json = _OBJECT.decode(data)
    if error := answer.get("error"):
        code = error.get("code")
        raise EngineRefused(code if isinstance(code, int) else 500, error.get("message", ""))
    if usage := answer.get("usage"):
        for details in ("prompt_tokens_details", "completion_tokens_details"):
            usage |= usage.get(details) or {}
    for choice in answer.get("choices") or ():
        reason = choice.pop("stop_reason", None)
        if reason is not None:
            choice["stop_text" if isinstance(reason, str) else "stop_token_id"] = reason
        if choice.get("logprobs") is not None:
            choice["logprobs"] = [*_logprobs(choice["logprobs"])]
        for number, call in enumerate((choice.get("message") or choice.get("delta") or {}).get("tool_calls") or ()):
            call |= {"index": number if call.get("index") is None else call["index"], **(call.get("function") or {})}
    return ParseDict(answer, message, ignore_unknown_fields=True)


def detokenize_response(data: bytes) -> pb.DetokenizeResponse:
    """Returns the message for an answer of POST /detokenize."""
    return pb.DetokenizeResponse(text=_OBJECT.decode(data)["prompt"])


def models_response(models: Sequence[ModelObject]) -> pb.ListModelsResponse:
    """Returns the message for the models that a tenant may use."""
    return ParseDict({"models": models}, pb.ListModelsResponse(), ignore_unknown_fields=True)


def _logprobs(logprobs: Json) -> Iterator[Json]:
    """Of a chat, which lists tokens, or of a completion, which has a list per property."""
    for token in logprobs.get("content") or ():
        yield token | {"top": token.get("top_logprobs")}
    tokens = logprobs.get("tokens") or ()
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    for token, logprob, top in zip(tokens, logprobs.get("token_logprobs") or (), tops, strict=False):
        alternatives = [{"token": text, "logprob": value} for text, value in (top or {}).items() if value is not None]
        yield {"token": token, "logprob": logprob, "top": alternatives}
