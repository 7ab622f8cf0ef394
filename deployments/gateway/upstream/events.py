"""Reads along with one answer: counts its tokens, and hides what the gateway asked for on its own account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import msgspec
from pydantic import BaseModel, ValidationError

from deployments.gateway.outline import Fields, Outline, nested_too_deeply
from deployments.gateway.paths import CHAT, COMPLETIONS
from deployments.gateway.upstream.sse import DONE, EventSplitter, data_at

_LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete", "response.failed")


class StreamOptions(BaseModel):
    """As vLLM reads them."""

    include_usage: bool | None = False


class StreamFields(BaseModel):
    """Fields that decide how a stream is read along and continued, with the engine's own types: `"true"` is true."""

    return_token_ids: bool | None = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    stream_options: StreamOptions | None = None

    @classmethod
    def of(cls, fields: Fields) -> Self:
        """Of a request; the defaults if the engine will refuse it."""
        try:
            return cls.model_validate(fields)
        except ValidationError:
            return cls()


@dataclass(frozen=True)
class EngineError:
    """An error event in a stream: what the engine would have answered, byte for byte, without one."""

    status: int
    body: bytes


class AnswerEvents:
    """One attempt's answer, streamed or not, on its way to the client.

    vLLM is asked for token ids along with the text, which makes counts exact and a lost stream continuable; a client
    that did not ask for them does not see them. Anything that cannot be parsed passes unchanged.
    """

    def __init__(self, path: str, outlined: Outline, body: bytes) -> None:
        self.path = path
        self.outline = outlined
        self.fields = outlined.fields
        self.prompt_tokens: int | None = None  # not known yet
        self.generated_tokens = 0
        self.saw_token = False
        self.finished = False  # the stream came to its own end
        self.error: EngineError | None = None  # the engine broke off with an error event
        self.text = ""  # what the client has, of a request's only choice
        self.prompt_ids: list[int] = []
        self.generated_ids: list[int] = []
        self.strange_delta = False  # the client has more than plain text: tool calls, reasoning
        self.head: dict[str, Any] = {}  # id, created, model, object of the stream's first chunk
        self._body = body
        self._split = EventSplitter()
        self.stream_fields = StreamFields.of(outlined.fields)
        self._wants_ids = bool(self.stream_fields.return_token_ids)
        self._asks_ids = path in (COMPLETIONS, CHAT) and outlined.stream and not outlined.echo
        self._seen_prompts: set[int] = set()
        self._per_prompt = max(1, outlined.sequences // max(1, outlined.prompts))
        self.finished_choices: set[int] = set()

    def upstream_body(self) -> bytes:
        """What the replica is sent. Raises RequestError."""
        if not self._asks_ids or self._wants_ids:
            return self._body
        try:
            return msgspec.json.encode({**self.fields, "return_token_ids": True})
        except RecursionError as error:
            raise nested_too_deeply() from error

    def whole(self, body: bytes) -> None:
        """Take the counts from an answer that was not streamed."""
        answer = json_object(body)
        if answer is not None:
            self._take_usage(answer.get("usage"))
            self._take_count(answer)
            self.finished = self.saw_token = True

    def feed(self, chunk: bytes) -> bytes:
        """Bytes as the replica sent them, cut anywhere -> whole events for the client; may be empty."""
        out = [self._event(event) for event in self._split.feed(chunk)]
        return b"".join(event + b"\n\n" for event in out if event)

    def edit(self, data: dict[str, Any]) -> dict[str, Any]:
        """The chunk as the client gets it. A continuation overrides this."""
        return data

    def _event(self, event: bytes) -> bytes:
        if self.error is not None:
            return b""  # the engine ends a stream that failed as if it were complete
        at = data_at(event)
        if at is None:
            return event  # a comment that keeps the connection alive
        text = event[at:].strip()
        if text == DONE:
            self.finished = True
            return event
        data = json_object(text)
        if data is None:
            return event
        if _is_error(data):
            self.error = EngineError(_status_of(data), msgspec.json.encode(data))
            return b""
        if self.path not in (COMPLETIONS, CHAT):
            self._follow(data)
            return event
        self._count(data)
        return event[:at] + b" " + msgspec.json.encode(self.edit(data))

    def _count(self, data: dict[str, Any]) -> None:
        """Take token ids, text and usage from a chunk of completions or chat; then hide the ids."""
        if not self.head:
            self.head = {key: data[key] for key in ("id", "object", "created", "model") if key in data}
        self._take_prompt(data, 0)
        for choice in data.get("choices") or ():
            self._take_prompt(choice, choice.get("index", 0) // self._per_prompt)
            ids = choice.get("token_ids")
            delta = choice.get("delta")
            text = choice.get("text") if delta is None else delta.get("content")
            if ids or text:
                self.saw_token = True
                self.generated_tokens += len(ids) if ids else 1
            if choice.get("finish_reason") is not None:
                self.finished_choices.add(choice.get("index", 0))
            if choice.get("index") == 0:
                self.generated_ids += ids or ()
                self.text += text or ""
            if delta is not None and any(value for key, value in delta.items() if key not in ("role", "content")):
                self.strange_delta = True
            if ids is not None and not self._wants_ids:
                choice["token_ids"] = None
        if isinstance(data.get("usage"), dict) and not data.get("choices"):
            self._take_usage(data["usage"])

    def _take_prompt(self, holder: dict[str, Any], prompt: int) -> None:
        ids = holder.get("prompt_token_ids")
        if not ids:
            return
        if prompt not in self._seen_prompts:
            self._seen_prompts.add(prompt)
            self.prompt_ids = self.prompt_ids or ids
            self.prompt_tokens = (self.prompt_tokens or 0) + len(ids)
        if not self._wants_ids:
            holder["prompt_token_ids"] = None

    def _take_usage(self, usage: object) -> None:
        """Of OpenAI's three APIs or of Anthropic's."""
        if not isinstance(usage, dict):
            return
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        generated = usage.get("completion_tokens", usage.get("output_tokens"))
        if isinstance(prompt, int) and prompt:
            self.prompt_tokens = prompt
        if isinstance(generated, int) and generated:
            self.generated_tokens = generated

    def _take_count(self, answer: dict[str, Any]) -> None:
        """Of /tokenize and count_tokens, which say what they counted."""
        for name in ("count", "input_tokens"):
            if isinstance(count := answer.get(name), int):
                self.prompt_tokens = count

    def _follow(self, data: dict[str, Any]) -> None:
        """An event of /v1/responses or /v1/messages: named by its `type`, usage inside."""
        kind = str(data.get("type", ""))
        if "delta" in kind and "delta" in data:
            self.saw_token = True
            self.generated_tokens += 1
        for holder in (data, data.get("response"), data.get("message")):
            if isinstance(holder, dict):
                self._take_usage(holder.get("usage"))
        if kind in _LAST_EVENTS:
            self.finished = True


def _is_error(data: dict[str, Any]) -> bool:
    """OpenAI's two shapes (`error` without choices; type `error`) and Anthropic's."""
    return data.get("type") == "error" or (isinstance(data.get("error"), dict) and "choices" not in data)


def _status_of(data: dict[str, Any]) -> int:
    """500 where the event does not say."""
    error = data.get("error")
    code = error.get("code") if isinstance(error, dict) else data.get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def json_object(text: bytes) -> dict[str, Any] | None:
    """Returns the JSON object that a text is; None if it is something else."""
    try:
        data = msgspec.json.decode(text)
    except (ValueError, RecursionError):  # DecodeError and UnicodeDecodeError are ValueErrors
        return None
    return data if isinstance(data, dict) else None
