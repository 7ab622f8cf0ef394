"""A stream whose replica was lost goes on elsewhere from the tokens that the client already has.

Exact for greedy requests (the same tokens) and for sampled ones without a seed (the same distribution: each token
depends on those before it only). `why_not` lists what cannot be continued exactly, and why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from cluster.errors import StreamLost
from deployments.gateway.outline import Outline
from deployments.gateway.paths import CHAT, COMPLETIONS
from deployments.gateway.upstream.events import AnswerEvents
from deployments.gateway.upstream.sse import EventSplitter

# (token ids, skip special tokens) -> text
Decode = Callable[[list[int], bool], Awaitable[str]]

# Sampling that depends on nothing but the tokens so far, and is spelled alike in both APIs.
_CARRIED = (
    "model", "stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "stop_token_ids", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "cache_salt", "priority", "user",
)  # fmt: skip
# Does its work before the first token, or is dealt with here.
_DONE_WITH = (
    "prompt", "messages", "stream", "max_tokens", "max_completion_tokens", "min_tokens", "return_token_ids",
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens",
    "documents", "truncate_prompt_tokens", "metadata", "store", "service_tier", "request_id", "stop",
    "include_stop_str_in_output", "n", "tool_choice", "parallel_tool_calls", "include_reasoning",
)  # fmt: skip
# Left at these values they change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
}
_REASONS: Mapping[str, str] = {
    "n": "several choices",
    "best_of": "several choices",
    "echo": "the prompt is echoed",
    "stop": "a stop string could begin in what was already sent",
    "presence_penalty": "penalties count generated tokens, which would have become prompt",
    "frequency_penalty": "penalties count generated tokens, which would have become prompt",
    "logprobs": "text offsets and log-probabilities would start again",
    "top_logprobs": "log-probabilities would start again",
    "tools": "the state of the tool call parser is lost",
    "response_format": "the state of the grammar is lost",
    "use_beam_search": "the beams are lost",
}
_LONGEST_HELD_BACK = 16  # tokens whose text the engine may not have sent yet; more than a character ever needs
_CONTEXT = 8  # prompt tokens before the first generated one, for tokenizers that look back


def why_not(path: str, outlined: Outline) -> str | None:
    """Why a stream of this request can never be continued; None if it can."""
    if path not in (COMPLETIONS, CHAT):
        return f"{path} keeps state in the replica"
    fields = outlined.fields
    if outlined.prompts > 1:
        return "several prompts in one request"
    if fields.get("seed") is not None and fields.get("temperature") != 0:
        return "its seed's random numbers are lost"
    for name, value in fields.items():
        if value is None:
            continue
        # Completions take a number of log-probabilities, and 0 is still that of the token itself.
        neutral = () if (path, name) == (COMPLETIONS, "logprobs") else _NEUTRAL.get(name, ())
        if value in neutral:
            continue
        if name in _REASONS:
            return _REASONS[name]
        if name not in _CARRIED and name not in _DONE_WITH:
            return f"`{name}` is not known to leave the stream continuable"
    return None


class Continuation(AnswerEvents):
    """A stream that can go on elsewhere after `continue_request`."""

    def __init__(self, path: str, outlined: Outline, body: bytes, decode: Decode) -> None:
        super().__init__(path, outlined, body)
        self._decode = decode
        self._continued = False
        self._kept = 0  # generated tokens at the last seam

    @property
    def why_not_continuable(self) -> str | None:
        """As `why_not`, with what the stream has shown so far."""
        if self.strange_delta:
            return "the state of the reasoning or tool call parser is lost"
        why = why_not(self.path, self.outline)
        return "the replica sent no token ids" if why is None and not self.prompt_ids else why

    def closing(self) -> bytes | None:
        """What is missing of a stream whose last token had come when its replica was lost; None if tokens are."""
        if len(self.finished_choices) < self.outline.sequences:
            return None
        options = self.stream_fields.stream_options
        usage = b""
        if options is not None and options.include_usage and self.prompt_tokens is not None:
            total = self.prompt_tokens + self.generated_tokens
            counts = {"prompt_tokens": self.prompt_tokens, "total_tokens": total}
            chunk = {**self.head, "choices": [], "usage": counts | {"completion_tokens": self.generated_tokens}}
            usage = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        self.finished = True
        return usage + b"data: [DONE]\n\n"

    async def continue_request(self, context_tokens: int | None) -> tuple[str, bytes]:
        """Path and body for another replica. `context_tokens`: longest prompt plus completion; None: not known.

        Raises StreamLost when the seam falls into the middle of a character.
        """
        kept = await self._sent_ids()
        del self.generated_ids[kept:]
        self.generated_tokens = self._kept = kept
        self._continued = True
        self._split = EventSplitter()
        self.error, self.finished = None, False
        request: dict[str, Any] = {name: self.fields[name] for name in _CARRIED if name in self.fields}
        left = max(1, context_tokens - len(self.prompt_ids)) if context_tokens else None
        bound = left if self.outline.max_new_tokens is None else self.outline.max_new_tokens
        request |= {
            "prompt": self.prompt_ids + self.generated_ids,
            "stream": True,
            "return_token_ids": True,
            "max_tokens": None if bound is None else bound - kept,
        }
        if self.stream_fields.min_tokens:
            request["min_tokens"] = max(0, self.stream_fields.min_tokens - kept)
        return COMPLETIONS, msgspec.json.encode(request)

    def edit(self, data: dict[str, Any]) -> dict[str, Any]:
        """A chunk of the new replica, in the old stream's terms."""
        if not self._continued:
            return data
        data |= self.head
        if isinstance(usage := data.get("usage"), dict):
            self.prompt_tokens = len(self.prompt_ids)  # to the new replica, what had been generated is prompt
            generated = usage.get("completion_tokens", 0) + self._kept
            data["usage"] = usage | {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": generated,
                "total_tokens": self.prompt_tokens + generated,
            }
            if not data.get("choices"):
                self.generated_tokens = generated
        for choice in data.get("choices") or ():
            choice["prompt_token_ids"] = None  # the client has had its prompt's
            if self.path == CHAT:
                choice["delta"] = {"content": choice.pop("text", "")}
                choice.pop("prompt_token_ids")
        return data

    async def _sent_ids(self) -> int:
        """How many of the generated ids make up exactly the text that the client has.

        The engine holds back tokens that end within a character, so the last ones may have sent nothing yet.
        """
        skip = self.stream_fields.skip_special_tokens
        context = self.prompt_ids[-_CONTEXT:]
        before = await self._decode(context, skip)
        most = len(self.generated_ids)
        for kept in range(most, max(-1, most - _LONGEST_HELD_BACK), -1):
            if await self._decode(context + self.generated_ids[:kept], skip) == before + self.text:
                if kept < most and self.stream_fields.return_token_ids:
                    break  # the client has the ids of these tokens already, and might get others now
                return kept
        raise StreamLost(
            "the attention replica of this stream was lost in the middle of a character, and the stream cannot go on "
            "exactly elsewhere; please ask again"
        )
