"""The fake's OpenAI API: the fields that it reads, and answers in the shapes of vLLM 0.32.

Shapes: vllm/entrypoints/openai/{completion,chat_completion}/{protocol,serving}.py. Unset fields are left out and null
ones kept, or the other way round, exactly where vLLM does so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from benchmarks.fakes.tokens import tokenize, word

Json = dict[str, object]
_CHAT_TOKENS = 256  # of a chat without a bound; vLLM: all that the context leaves


class FakeStreamOptions(msgspec.Struct):
    """See OpenAI; `continuous_usage_stats` is vLLM's."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class FakeRequest(msgspec.Struct):
    """The fields of a request that the fake reads; it ignores all others."""

    model: str | None = None
    prompt: str | list[int | str | list[int]] | None = None
    messages: list[Json] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: FakeStreamOptions | None = None
    return_token_ids: bool | None = None
    ignore_eos: bool = False

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt. Raises ValueError for none."""
        if self.messages is not None:
            turns = "".join(f"<{turn.get('role')}>{turn.get('content')}" for turn in self.messages)
            return [tokenize(turns.encode() + b"<assistant>")]
        if isinstance(self.prompt, str):
            return [tokenize(self.prompt.encode())]
        texts = [one for one in self.prompt or () if isinstance(one, str)]
        lists = [one for one in self.prompt or () if isinstance(one, list)]
        ids = [one for one in self.prompt or () if isinstance(one, int)]
        found = [tokenize(text.encode()) for text in texts] + lists + ([ids] if ids else [])
        if not found or not all(found):
            raise ValueError("the prompt is empty")
        return found

    @property
    def chat(self) -> bool:
        """Return whether it is a chat, not a plain completion."""
        return self.messages is not None

    def new_tokens(self) -> int:
        """Return the most tokens that one sequence may have."""
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return max(1, asked if asked is not None else _CHAT_TOKENS if self.chat else 16)


class FakeAnswer:
    """Builds one request's answer, chunk by chunk or whole."""

    def __init__(self, asked: FakeRequest, model: str, request_id: str, prompts: Sequence[Sequence[int]]) -> None:
        self._asked = asked
        self._prompts = prompts
        self._generated = [0] * len(prompts) * asked.n
        kind = "chat.completion" if asked.chat else "text_completion"
        if asked.chat and asked.stream:
            kind += ".chunk"
        prefix = "chatcmpl-" if asked.chat else "cmpl-"
        self._head: Json = {
            "id": prefix + request_id, "object": kind, "created": int(time.time()), "model": model
        }  # fmt: skip

    def chunks(self, index: int, token: int, finish: str | None) -> bytes:
        """Server-sent events of one more token of choice `index`."""
        first = not self._generated[index]
        self._generated[index] += 1
        ids = self._asked.return_token_ids
        prompt = self._prompts[index // self._asked.n]
        events = b""
        if self._asked.chat:
            if first:
                choice: Json = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                role = self._head | {"choices": [choice | {"finish_reason": None}]}
                role["prompt_token_ids"] = prompt if ids else None
                events = _event(role | self._usage_so_far(index, 0))
            choice = {"index": index, "delta": {"content": word(token)}, "logprobs": None, "finish_reason": finish}
            if finish is not None:
                choice["stop_reason"] = None
            choice["token_ids"] = [token] if ids else None
        else:
            choice = {
                "index": index, "text": word(token), "logprobs": None, "finish_reason": finish, "stop_reason": None,
                "prompt_token_ids": prompt if ids and first else None, "token_ids": [token] if ids else None,
            }  # fmt: skip
        return events + _event(self._head | {"choices": [choice]} | self._usage_so_far(index, self._generated[index]))

    def end(self) -> bytes:
        """The closing events of a stream."""
        options = self._asked.stream_options
        usage = b""
        if options is not None and options.include_usage:
            usage = _event(self._head | {"choices": [], "usage": self._usage()})
        return usage + b"data: [DONE]\n\n"

    def whole(self, tokens: Sequence[Sequence[int]], finish: Sequence[str]) -> bytes:
        """The answer in one piece; ids and reason of each choice."""
        ids = self._asked.return_token_ids
        choices: list[Json] = []
        for index, own in enumerate(tokens):
            self._generated[index] = len(own)
            text = "".join(map(word, own))
            choice: Json = {"index": index}
            if self._asked.chat:
                choice["message"] = {"role": "assistant", "content": text, "reasoning": None}
            else:
                choice["text"] = text
                choice["prompt_token_ids"] = self._prompts[index // self._asked.n] if ids else None
            choice |= {"logprobs": None, "finish_reason": finish[index], "stop_reason": None}
            choice["token_ids"] = own if ids else None
            choices.append(choice)
        body = self._head | {"choices": choices, "usage": self._usage() | {"prompt_tokens_details": None}}
        if self._asked.chat:
            body["prompt_token_ids"] = self._prompts[0] if ids else None
        return msgspec.json.encode(body)

    def _usage(self) -> Json:
        return _usage(sum(map(len, self._prompts)), sum(self._generated))

    def _usage_so_far(self, index: int, generated: int) -> Json:
        options = self._asked.stream_options
        if options is None or not (options.include_usage and options.continuous_usage_stats):
            return {}
        return {"usage": _usage(len(self._prompts[index // self._asked.n]), generated)}


def error(status: int, message: str) -> bytes:
    """An error in OpenAI's shape."""
    kind = {400: "BadRequestError", 401: "Unauthorized", 404: "NotFoundError"}.get(status, "InternalServerError")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


def _usage(prompt: int, generated: int) -> Json:
    return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}


def _event(fields: Json) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"
