"""vLLM's JSON answers, as far as the gRPC API passes them on. Unknown fields are dropped.

Source: vllm/entrypoints/openai/{chat_completion,completion,models}/protocol.py and serve/{engine,tokenize}/protocol.py.
"""

from __future__ import annotations

import msgspec


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    id: str | None = None
    index: int | None = None
    function: Function | None = None


class Message(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class Alternative(msgspec.Struct):
    token: str
    logprob: float


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[Alternative] | None = None


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob] | None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: Message | None = None
    delta: Message | None = None
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class ErrorBody(msgspec.Struct):
    """An answer other than 200."""

    error: Error


class Answer(msgspec.Struct):
    """What chat and completions have in common, whole or as one event of a stream."""

    id: str = ""
    model: str = ""
    created: int = 0
    usage: Usage | None = None
    error: Error | None = None  # in streams: vLLM's word that it failed


class Chat(Answer):
    """Of POST /v1/chat/completions: choices have a `message`, or in events a `delta`."""

    choices: list[ChatChoice] = []
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """Of POST /v1/completions."""

    choices: list[CompletionChoice] = []


class Tokens(msgspec.Struct):
    """Of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """Of POST /detokenize."""

    prompt: str
