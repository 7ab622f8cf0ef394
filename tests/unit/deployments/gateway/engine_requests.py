"""What vLLM's own request classes make of a request body, with a chat template and a tokenizer that show it.

Every TOKEN in a text is one token, and nothing else is; the template is all texts of the conversation one after the
other. So texts of the engine's own (JSON's brackets, role markers) weigh nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages, construct_tool_dicts
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import (
    MM_PARSER_MAP,
    ChatCompletionContentPartParam,
    ChatCompletionMessageParam,
    parse_chat_messages,
)
from vllm.renderers.inputs.preprocess import prompt_to_seq
from vllm.renderers.online_renderer import _reused_prompt_token_ids
from vllm.sampling_params import BeamSearchParams

TOKEN = "界"
CONTEXT = 2**20
REQUESTS: dict[str, Any] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": AnthropicMessagesRequest,
    "/v1/messages/count_tokens": AnthropicCountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ADAPTERS = {path: TypeAdapter(kind) for path, kind in REQUESTS.items()}  # kept: what they make is validated late
_RENDERER = SimpleNamespace(validate_token_ids=lambda ids, parameter: None)  # of a vocabulary that has them all
_MODEL = SimpleNamespace(max_model_len=CONTEXT, enable_prompt_embeds=False, multimodal_config=None)


@dataclass(frozen=True)
class Run:
    """What the engine runs for one request."""

    model: str | None
    stream: bool
    echo: bool
    truncation: int | None
    prompt_tokens: int
    ids_only: bool
    prompts: int
    sequences: int
    bounds: tuple[tuple[int, int], ...]  # of one sequence of each prompt, and the room for it


class Refused(Exception):
    """vLLM answers with an error."""


# vLLM makes errors of all of them, a 400 of some and a 500 of others.
_ERRORS = (
    ValidationError, VLLMValidationError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    NotImplementedError,
)  # fmt: skip


def fields_of(path: str) -> set[str]:
    """Names of the fields that vLLM's request class for a path has."""
    kinds = get_args(REQUESTS[path]) or (REQUESTS[path],)
    return {name for kind in kinds for name in kind.model_fields}


def names_in(union: object) -> set[str]:
    """Names of the fields of all typed dictionaries in a union."""
    names = set(getattr(union, "__annotations__", {}))
    for one in get_args(union):
        names |= names_in(one)
    return names


MESSAGE_FIELDS = sorted(names_in(ChatCompletionMessageParam) | {"reasoning_content"})
PART_FIELDS = sorted(names_in(ChatCompletionContentPartParam))
TEXT_PARTS = [kind for kind in sorted(MM_PARSER_MAP) if not any(word in kind for word in ("image", "audio", "video"))]


def run(path: str, body: bytes, merge_inline_system: bool, content_format: str) -> Run:
    """As vLLM's server would run it. Raises Refused where it answers with an error of any kind."""
    try:
        request = _ADAPTERS[path].validate_python(json.loads(body))
        if isinstance(request, CompletionRequest):
            return _completion(request)
        if isinstance(request, DetokenizeRequest):
            return _no_generation(request, len(request.tokens), ids_only=True)
        if path == "/tokenize" and not isinstance(request, TokenizeChatRequest):
            return _no_generation(request, tokens(request.prompt))
        if isinstance(request, AnthropicMessagesRequest | AnthropicCountTokensRequest):
            chat = AnthropicServingMessages.to_chat_completion_request(request, merge_inline_system=merge_inline_system)
            if isinstance(request, AnthropicMessagesRequest):
                return _chat(chat, content_format)
            return _no_generation(request, _prompt(chat, chat.messages, _dumped(chat), content_format)[0])
        if isinstance(request, TokenizeChatRequest):
            prompt, ids_only = _prompt(request, request.messages, _dumped(request), content_format)
            return _no_generation(request, prompt, ids_only)
        if isinstance(request, ResponsesRequest):
            return _responses(request, content_format)
        return _chat(request, content_format)
    except _ERRORS as error:
        raise Refused(str(error)) from error


def tokens(value: object, name: str = "") -> int:
    """Tokens of all texts in a value; of a dictionary, of its keys too."""
    if isinstance(value, str):
        return value.count(TOKEN)
    if isinstance(value, dict):
        return sum(tokens(key) + tokens(one) for key, one in value.items() if key != "reasoning_content")
    if isinstance(value, list | tuple):
        return sum(map(tokens, value))
    if hasattr(value, "model_dump"):
        return tokens(value.model_dump())
    return 0


def _completion(request: CompletionRequest) -> Run:
    params = request.build_tok_params(_MODEL)
    if request.suffix is not None or request.prompt_embeds is not None:
        raise Refused("not supported")
    prompts = prompt_to_seq(request.prompt)
    sizes = [tokens(one) if isinstance(one, str) else len(one) for one in prompts]
    runs = [_sequences(request, request.max_tokens, size) for size in sizes]
    return Run(
        request.model, bool(request.stream), bool(request.echo), params.truncate_prompt_tokens, sum(sizes),
        not any(isinstance(one, str) for one in prompts), len(prompts), sum(n for n, _ in runs),
        tuple(bound for _, bound in runs),
    )  # fmt: skip


def _chat(request: ChatCompletionRequest, content_format: str) -> Run:
    params = request.build_tok_params(_MODEL)
    prompt, ids_only = _prompt(request, request.messages, _dumped(request), content_format)
    bound = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    n, bounds = _sequences(request, bound, prompt)
    return Run(
        request.model, bool(request.stream), False, params.truncate_prompt_tokens, prompt, ids_only, 1, n, (bounds,)
    )


def _responses(request: ResponsesRequest, content_format: str) -> Run:
    params = request.build_tok_params(_MODEL)
    if request.background or request.previous_response_id is not None:
        raise Refused("nothing is stored")
    messages = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
    tools = construct_tool_dicts(request.tools, request.tool_choice)
    prompt, ids_only = _prompt(request, messages, tools, content_format)
    truncation = -1 if request.truncation != "disabled" else None
    most = get_max_tokens(CONTEXT, request.max_output_tokens, prompt, {}, truncate_prompt_tokens=truncation)
    sampling = request.to_sampling_params(most, {})
    return Run(
        request.model, bool(request.stream), False, params.truncate_prompt_tokens, prompt, ids_only, 1, sampling.n,
        ((sampling.max_tokens, CONTEXT - prompt),),
    )  # fmt: skip


def _no_generation(request: Any, prompt: int, ids_only: bool = False) -> Run:
    return Run(request.model, False, False, None, prompt, ids_only, 1, 0, ())


def _sequences(request: Any, stated: int | None, prompt: int) -> tuple[int, tuple[int, int]]:
    cut = request.truncate_prompt_tokens
    most = get_max_tokens(CONTEXT, stated, prompt, {}, truncate_prompt_tokens=cut)
    room = CONTEXT - (prompt if cut in (None, -1) else min(prompt, cut))
    if request.use_beam_search:
        beams: BeamSearchParams = request.to_beam_search_params(most, {})
        return beams.beam_width, (beams.max_tokens, room)
    sampling = request.to_sampling_params(most, {})
    return sampling.n, (sampling.max_tokens, room)


def _prompt(request: Any, messages: list[Any], tools: object, content_format: str) -> tuple[int, bool]:
    if ids := _reused_prompt_token_ids(request, _RENDERER, messages):
        return len(ids), True
    if getattr(request, "chat_template", None) is not None:
        raise Refused("templates of clients are not trusted")
    conversation, _, _ = parse_chat_messages(messages, _MODEL, content_format)  # type: ignore[arg-type]
    params = request.build_chat_params(None, "auto")
    shown = params.with_defaults({"tools": tools}).chat_template_kwargs  # whose place kwargs of the client may take
    return tokens(conversation) + tokens(shown) + tokens(params.response_format), False


def _dumped(request: Any) -> list[dict[str, object]] | None:
    return None if request.tools is None else [tool.model_dump() for tool in request.tools]
