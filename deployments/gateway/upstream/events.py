"""Reads along with one answer: counts its tokens, and hides what the gateway asked for on its own account."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from deployments.gateway.outline import Fields, nested_too_deeply

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_DATA = b"data: "
_DONE = b"data: [DONE]"
_EVENT_END = re.compile(rb"\r?\n\r?\n")


class StreamTap:
    """One request's answer, streamed or not, on its way to the client.

    vLLM is asked for token ids along with the text, which makes counts exact and a lost stream continuable; a client
    that did not ask for them does not see them. Anything that cannot be parsed passes unchanged.
    """

    def __init__(self, path: str, fields: Fields, body: bytes) -> None:
        self.path = path
        self.fields = fields
        self.prompt_tokens: int | None = None  # not known yet
        self.generated_tokens = 0
        self.saw_token = False
        self.finished = False  # the stream came to its own end
        self.failed = False  # the engine broke off with an error event
        self.text = ""  # what the client has, of a request's only choice
        self.prompt_ids: list[int] = []
        self.generated_ids: list[int] = []
        self.strange_delta = False  # the client has more than plain text: tool calls, reasoning
        self.head: dict[str, Any] = {}  # id, created, model, object of the stream's first chunk
        self._body = body
        self._pending = b""
        self._wants_ids = fields.get("return_token_ids") is True
        self._asks_ids = path in (COMPLETIONS, CHAT) and fields.get("stream") is True and not fields.get("echo")
        self._seen_prompts: set[int] = set()
        n = fields.get("n")
        self._n = n if isinstance(n, int) and n > 0 else 1
        prompt = fields.get("prompt")
        several = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
        self.choices = self._n * (len(prompt) if several and isinstance(prompt, list) else 1)
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
        answer = _json_object(body)
        if answer is not None:
            self._take_usage(answer.get("usage"))
            self.finished = self.saw_token = True

    def feed(self, chunk: bytes) -> bytes:
        """Bytes as the replica sent them, cut anywhere -> whole events for the client; may be empty."""
        if b"\n" not in chunk:  # within a huge event, which is not searched again and again
            self._pending += chunk
            return b""
        *events, self._pending = _EVENT_END.split(self._pending + chunk)
        out = [self._event(event) for event in events]
        return b"".join(event + b"\n\n" for event in out if event)

    def edit(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk as the client gets it; None hides it. A continuation overrides this."""
        return data

    def _event(self, event: bytes) -> bytes:
        if self.failed:
            return b""  # the engine ends a stream that failed as if it were complete
        if event.startswith(_DONE):
            self.finished = True
            return event
        at = 0 if event.startswith(_DATA) else event.find(b"\n" + _DATA) + 1
        if at == 0 and not event.startswith(_DATA):
            return event  # a comment that keeps the connection alive
        data = _json_object(event[at + len(_DATA) :])
        if data is None:
            return event
        if "error" in data and "choices" not in data and self.path in (COMPLETIONS, CHAT):
            self.failed = True
            return b""
        if self.path not in (COMPLETIONS, CHAT):
            self._follow(data)
            return event
        self._count(data)
        shown = self.edit(data)
        return b"" if shown is None else event[:at] + _DATA + msgspec.json.encode(shown)

    def _count(self, data: dict[str, Any]) -> None:
        """Take token ids, text and usage from a chunk of completions or chat; then hide the ids."""
        if not self.head:
            self.head = {key: data[key] for key in ("id", "object", "created", "model") if key in data}
        self._take_prompt(data, 0)
        for choice in data.get("choices") or ():
            self._take_prompt(choice, choice.get("index", 0) // self._n)
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

    def _follow(self, data: dict[str, Any]) -> None:
        """An event of /v1/responses or /v1/messages: named by its `type`, usage inside."""
        kind = str(data.get("type", ""))
        if "delta" in kind and "delta" in data:
            self.saw_token = True
            self.generated_tokens += 1
        for holder in (data, data.get("response"), data.get("message")):
            if isinstance(holder, dict):
                self._take_usage(holder.get("usage"))
        if kind in ("message_stop", "response.completed", "response.incomplete", "response.failed", "error"):
            self.finished = True


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        data = msgspec.json.decode(text)
    except (ValueError, RecursionError):  # DecodeError and UnicodeDecodeError are ValueErrors
        return None
    return data if isinstance(data, dict) else None
