"""Outline of a request, by a schema of its path alone.

The schemas repeat fields, types and defaults of the engine's own request classes, and the same library validates both
in the same lax mode: `"n": "60"` is 60 here as there. Fields of other paths are ignored, as the engine ignores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from cluster.errors import RequestError
from deployments.gateway.outline.body import MAX_PARTS, Fields, parse, too_many_parts
from deployments.gateway.outline.prompt import PromptText, has_images, has_media
from deployments.gateway.paths import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    MESSAGES,
    RESPONSES,
    TOKENIZE,
)

COMPLETIONS_NEW_TOKENS = 16  # the engine's default of max_tokens for /v1/completions, for null as well
MAX_NEW_TOKENS = 2**31 - 1  # of one sequence; what is asked beyond it is as good as no bound
_MAX_N = 2**31 - 1  # keeps arithmetic sane; what one request may ask for is the caller's to say
_Truncation = Annotated[int, Field(ge=-1)]
_Text = Annotated[object, PromptText.add]
_Last = Annotated[object, PromptText.add_last]
_Tools = Annotated[object, PromptText.tools]
_Messages = Annotated[object, PromptText.messages]


@dataclass(frozen=True)
class Outline:
    """What admission and routing need to know of one request. Never less than the engine will run of it.

    The chat template's own text is not counted, nor what a template given with the request may make of it (engines
    refuse such templates unless their operator trusts them). Media parts count as their JSON.
    """

    fields: Fields  # as parsed; not to be changed
    model: str | None  # as named; None if absent or empty
    stream: bool = False
    prompt_text: bytes = b""  # UTF-8, in the order of the prompt; of prompts of ids the ids as JSON, for their prefixes
    prompt_ids: int = 0  # token ids given as such, over all prompts; if there are any, they are the whole prompt
    prompts: int = 1  # 1 except for completions
    sequences: int = 0  # n times prompts; 0 for paths that generate nothing
    max_new_tokens: int | None = 0  # of one sequence; None: what is left of the context, or the engine's own default
    echo: bool = False  # completions
    truncate_prompt_tokens: int | None = None  # each prompt is cut to so many tokens; -1: to what fits into the context


def outline(path: str, body: bytes) -> Outline:
    """Outline of a request for one of the paths that have a body.

    Raises RequestError for what `parse` refuses, for a field of a type that the engine refuses, and for a prompt of
    more than MAX_PARTS pieces. Whatever else is wrong with the request is left to the engine.
    """
    fields = parse(body)
    try:
        return _SCHEMAS[path].model_validate(fields).outline(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RequestError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}") from error


class _Request(BaseModel):
    """Fields of type `object` are read as prompt text only, whatever they hold: by the method of `PromptText` in their
    annotation, in the order in which they stand.
    """

    model: str | None = None

    def outline(self, fields: Fields) -> Outline:
        """Of a request that generates nothing."""
        ids, text = self._prompt()
        return Outline(fields, self.model or None, prompt_text=text, prompt_ids=ids)

    def _prompt(self) -> tuple[int, bytes]:
        """Returns the number of token ids, and the text."""
        text = PromptText()
        for name, field in type(self).model_fields.items():
            for read in field.metadata:
                read(text, getattr(self, name))
        return 0, text.joined()


class _Rendered(_Request):
    """A request whose prompt a chat template makes, unless it brings the token ids of an earlier prefill.

    The engine ignores those ids where it must echo the messages, or where the messages have media.
    """

    kv_transfer_params: object = None

    def _prompt(self) -> tuple[int, bytes]:
        transfer = self.kv_transfer_params
        ids = transfer.get("prompt_token_ids") if isinstance(transfer, dict) else None
        if not isinstance(ids, list) or not ids or getattr(self, "echo", False):
            return super()._prompt()
        if self._may_have_media():  # either counts
            _, text = super()._prompt()
            return max(len(ids), len(text)), text
        prompt = PromptText()
        prompt.add(ids)
        return len(ids), prompt.joined()

    def _may_have_media(self) -> bool:
        return has_media(getattr(self, "messages", None))

    def _generating(
        self, fields: Fields, stream: bool | None, bound: int | None, n: int | None, truncation: int | None
    ) -> Outline:
        ids, text = self._prompt()
        return Outline(
            fields, self.model or None, bool(stream), text, ids, sequences=_count(n), max_new_tokens=_bound(bound),
            truncate_prompt_tokens=truncation,
        )  # fmt: skip


class _Completion(_Request):
    prompt: object = None
    prompt_embeds: object = None
    echo: bool | None = False
    max_tokens: int | None = COMPLETIONS_NEW_TOKENS
    n: int = 1
    stream: bool | None = False
    truncate_prompt_tokens: _Truncation | None = None

    def outline(self, fields: Fields) -> Outline:
        bound = COMPLETIONS_NEW_TOKENS if self.max_tokens is None else self.max_tokens
        text = PromptText()
        prompts, ids = _prompts(self.prompt)
        if ids or not isinstance(self.prompt, list):
            text.add(self.prompt)
        else:
            text.content(self.prompt)
        embeddings = self.prompt_embeds if isinstance(self.prompt_embeds, list) else [self.prompt_embeds]
        for one in embeddings[: MAX_PARTS + 1]:
            if isinstance(one, str):
                text.add(one, last=True)
                prompts += 1
                ids += len(one) if ids else 0  # far more than it has tokens
        prompts = max(1, prompts)
        return Outline(
            fields, self.model or None, bool(self.stream), text.joined(), ids, prompts,
            _count(self.n) * prompts, _bound(bound), bool(self.echo), self.truncate_prompt_tokens,
        )  # fmt: skip


class _Chat(_Rendered):
    tools: _Tools = None
    documents: _Text = None
    chat_template_kwargs: _Text = None
    chat_template: _Text = None
    messages: _Messages = None
    response_format: _Last = None  # some models' templates show it
    echo: bool | None = False
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    n: int | None = 1
    stream: bool | None = False
    truncate_prompt_tokens: _Truncation | None = None

    def outline(self, fields: Fields) -> Outline:
        bound = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._generating(fields, self.stream, bound, self.n, self.truncate_prompt_tokens)


class _Responses(_Rendered):
    tools: _Tools = None
    chat_template_kwargs: _Text = None
    instructions: _Text = None
    previous_input_messages: _Text = None
    input: Annotated[object, PromptText.input] = None
    echo: object = None  # unknown to the engine's class, which keeps it, and read all the same
    max_output_tokens: int | None = None
    stream: bool | None = False
    truncation: object = "disabled"

    def outline(self, fields: Fields) -> Outline:
        truncation = None if self.truncation == "disabled" else -1
        return self._generating(fields, self.stream, self.max_output_tokens, 1, truncation)

    def _may_have_media(self) -> bool:
        items = self.input if isinstance(self.input, list) else []
        # The parts of a reasoning item are text, whatever their type.
        return has_media([one for one in items if not _is_reasoning(one)], ("content", "output"))


def _is_reasoning(item: object) -> bool:
    return isinstance(item, dict) and item.get("type") == "reasoning"


class _CountTokens(_Request):
    tools: _Tools = None
    chat_template_kwargs: _Text = None
    system: Annotated[object, PromptText.system] = None
    messages: Annotated[object, PromptText.conversation] = None
    output_config: _Last = None  # its JSON schema becomes a chat's response_format


class _AnthropicMessages(_Rendered, _CountTokens):
    max_tokens: int
    stream: bool | None = False

    def outline(self, fields: Fields) -> Outline:
        return self._generating(fields, self.stream, self.max_tokens, 1, None)

    def _may_have_media(self) -> bool:
        return has_images(self.messages)


class _Tokenize(_Rendered):
    tools: _Tools = None
    chat_template_kwargs: _Text = None
    chat_template: _Text = None
    prompt: _Text = None
    messages: _Messages = None
    echo: object = None  # as in `_Responses`

    def _prompt(self) -> tuple[int, bytes]:
        """With a prompt beside messages the engine takes either: both count, and ids at least as the prompt's bytes."""
        ids, text = super()._prompt()
        if ids and isinstance(self.prompt, str):
            _, text = _Request._prompt(self)
            ids = max(ids, len(text)) if isinstance(self.messages, list) else 0
        return ids, text


class _Detokenize(_Request):
    tokens: object = None

    def _prompt(self) -> tuple[int, bytes]:
        return len(self.tokens) if isinstance(self.tokens, list) else 0, b""


_SCHEMAS: dict[str, type[_Request]] = {
    COMPLETIONS: _Completion,
    CHAT: _Chat,
    RESPONSES: _Responses,
    MESSAGES: _AnthropicMessages,
    COUNT_TOKENS: _CountTokens,
    TOKENIZE: _Tokenize,
    DETOKENIZE: _Detokenize,
}


def _count(n: int | None) -> int:
    return 1 if n is None else min(max(n, 1), _MAX_N)


def _bound(tokens: int | None) -> int | None:
    """What is below 1 is refused, or makes one token: an echo alone, say."""
    return None if tokens is None else min(max(tokens, 1), MAX_NEW_TOKENS)


def _prompts(prompt: object) -> tuple[int, int]:
    """Number of prompts of a completion, and of token ids in them."""
    if not isinstance(prompt, list):
        return (0 if prompt is None else 1), 0
    if not prompt:
        return 0, 0
    if isinstance(prompt[0], list):
        return len(prompt), sum(len(one) for one in prompt if isinstance(one, list))
    if isinstance(prompt[0], str):
        if len(prompt) > MAX_PARTS:
            raise too_many_parts()
        if all(isinstance(one, str) for one in prompt):
            return len(prompt), 0
    return 1, len(prompt)  # numbers, or texts of numbers among numbers
