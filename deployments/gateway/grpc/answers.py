"""vLLM's JSON answers to deepsplit.v1 messages. What vLLM sends beyond the messages' fields is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from cluster.errors import EngineRefused
from deployments.gateway.grpc.vllm_answers import (
    Answer,
    Chat,
    ChatLogprobs,
    Completion,
    CompletionLogprobs,
    Function,
    Message,
    Text,
    Tokens,
    Usage,
)
from deployments.gateway.models import ModelObject
from deployments.protos.deepsplit.v1 import inference_pb2 as pb

_CHAT = msgspec.json.Decoder(Chat)
_COMPLETION = msgspec.json.Decoder(Completion)


def chat_response(data: bytes) -> pb.ChatResponse:
    """Raises msgspec.DecodeError for what no vLLM sends, as all here do."""
    answer = _CHAT.decode(data)
    response = pb.ChatResponse(id=answer.id, model=answer.model, created=answer.created, usage=_usage(answer.usage))
    response.prompt_token_ids.extend(answer.prompt_token_ids or ())
    for choice in answer.choices:
        turned = response.choices.add(
            index=choice.index, message=_message(choice.message), finish_reason=choice.finish_reason or "",
            logprobs=_chat_logprobs(choice.logprobs), token_ids=choice.token_ids or (),
        )  # fmt: skip
        _set_stop_reason(turned, choice.stop_reason)
    return response


def chat_chunk(data: bytes) -> pb.ChatChunk:
    """Raises EngineRefused for an event that is an error."""
    answer = _CHAT.decode(data)
    _raise_for(answer)
    chunk = pb.ChatChunk(id=answer.id, model=answer.model, created=answer.created, usage=_usage(answer.usage))
    chunk.prompt_token_ids.extend(answer.prompt_token_ids or ())
    for choice in answer.choices:
        turned = chunk.choices.add(
            index=choice.index, delta=_message(choice.delta), finish_reason=choice.finish_reason or "",
            logprobs=_chat_logprobs(choice.logprobs), token_ids=choice.token_ids or (),
        )  # fmt: skip
        _set_stop_reason(turned, choice.stop_reason)
    return chunk


def completion(data: bytes) -> Completion:
    """Raises EngineRefused for an event that is an error."""
    answer = _COMPLETION.decode(data)
    _raise_for(answer)
    return answer


def completion_response(data: bytes) -> pb.CompletionResponse:
    """Of a whole answer."""
    answer = completion(data)
    return pb.CompletionResponse(
        id=answer.id, model=answer.model, created=answer.created, choices=_completion_choices(answer),
        usage=_usage(answer.usage),
    )  # fmt: skip


def completion_chunk(data: bytes) -> pb.CompletionChunk:
    """Raises EngineRefused for an event that is an error."""
    answer = completion(data)
    return pb.CompletionChunk(
        id=answer.id, model=answer.model, created=answer.created, choices=_completion_choices(answer),
        usage=_usage(answer.usage),
    )  # fmt: skip


def tokenize_response(data: bytes) -> pb.TokenizeResponse:
    """Of POST /tokenize."""
    answer = msgspec.json.decode(data, type=Tokens)
    return pb.TokenizeResponse(
        count=answer.count, max_model_len=answer.max_model_len, tokens=answer.tokens, token_strs=answer.token_strs or ()
    )


def detokenize_response(data: bytes) -> pb.DetokenizeResponse:
    """Of POST /detokenize."""
    return pb.DetokenizeResponse(text=msgspec.json.decode(data, type=Text).prompt)


def models_response(models: Sequence[ModelObject]) -> pb.ListModelsResponse:
    """Of the models that a tenant may use."""
    return pb.ListModelsResponse(
        models=[
            pb.Model(
                id=one["id"], created=one["created"], owned_by=one["owned_by"],
                max_model_len=one["max_model_len"] or 0,
            )
            for one in models
        ]
    )  # fmt: skip


# --- parts ---


class _Stopped(Protocol):
    stop_text: str
    stop_token_id: int


def _raise_for(answer: Answer) -> None:
    if answer.error is not None:
        status = answer.error.code if isinstance(answer.error.code, int) else 500
        raise EngineRefused(status, answer.error.message)


def _set_stop_reason(choice: _Stopped, reason: int | str | None) -> None:
    if isinstance(reason, str):
        choice.stop_text = reason
    elif reason is not None:
        choice.stop_token_id = reason


def _usage(usage: Usage | None) -> pb.Usage | None:
    if usage is None:
        return None
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
        total_tokens=usage.total_tokens,
        cached_tokens=None if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens,
        reasoning_tokens=(
            None if usage.completion_tokens_details is None else usage.completion_tokens_details.reasoning_tokens
        ),
    )


def _message(message: Message | None) -> pb.Message:
    if message is None:
        return pb.Message()
    turned = pb.Message(role=message.role or "", content=message.content, reasoning=message.reasoning)
    for number, call in enumerate(message.tool_calls or ()):
        function = call.function or Function()
        index = number if call.index is None else call.index
        turned.tool_calls.add(
            id=call.id or "", name=function.name or "", arguments=function.arguments or "", index=index
        )
    return turned


def _chat_logprobs(logprobs: ChatLogprobs | None) -> Iterator[pb.TokenLogprob]:
    for one in (logprobs.content if logprobs else None) or ():
        top = [pb.TokenLogprob.Alternative(token=each.token, logprob=each.logprob) for each in one.top_logprobs or ()]
        yield pb.TokenLogprob(token=one.token, logprob=one.logprob, top=top)


def _completion_choices(answer: Completion) -> Iterable[pb.CompletionChoice]:
    for choice in answer.choices:
        turned = pb.CompletionChoice(
            index=choice.index, text=choice.text, finish_reason=choice.finish_reason or "",
            logprobs=_completion_logprobs(choice.logprobs), token_ids=choice.token_ids or (),
            prompt_token_ids=choice.prompt_token_ids or (),
        )  # fmt: skip
        _set_stop_reason(turned, choice.stop_reason)
        yield turned


def _completion_logprobs(logprobs: CompletionLogprobs | None) -> Iterator[pb.TokenLogprob]:
    if logprobs is None:
        return
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False):
        alternatives = [
            pb.TokenLogprob.Alternative(token=each, logprob=value)
            for each, value in (top or {}).items() if value is not None
        ]  # fmt: skip
        yield pb.TokenLogprob(token=token, logprob=logprob, top=alternatives)
