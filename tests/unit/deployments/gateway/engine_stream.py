"""The streams that vLLM answers with, for tests: what a model that always says the same thing would have it send."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from deployments.gateway.paths import CHAT

EOS = 1  # of models/demo
Json = dict[str, object]


@dataclass(frozen=True)
class Engine:
    """Answers every request that begins with `prompt` with the rest of `answer`, whose last token ends it."""

    tokenizer: Tokenizer
    prompt: Sequence[int]
    answer: Sequence[int]
    tokens_per_chunk: int = 1  # more: speculative decoding

    def stream(self, path: str, body: bytes) -> list[bytes]:
        """One item per event."""
        asked = json.loads(body)
        assert asked["stream"] is True
        prompt = list(self.prompt)
        if isinstance(asked.get("prompt"), list):
            prompt = asked["prompt"]
        done = len(prompt) - len(self.prompt)
        assert prompt == [*self.prompt, *self.answer[:done]], "the model would have said something else"
        most = asked.get("max_completion_tokens") if path == CHAT else None
        most = asked.get("max_tokens", None if path == CHAT else 16) if most is None else most
        left = self.answer[done:] if most is None else self.answer[done : done + most]
        assert left, "nothing is left to generate"
        return [
            b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in self._chunks(path, asked, prompt, left)
        ] + [b"data: [DONE]\n\n"]

    def _chunks(self, path: str, asked: Json, prompt: list[int], left: Sequence[int]) -> Iterator[Json]:
        chat = path == CHAT
        ids = asked.get("return_token_ids") is True
        options = asked.get("stream_options") or {}
        assert isinstance(options, Mapping)
        kind = "chat.completion.chunk" if chat else "text_completion"
        # Two replicas never agree on these two.
        head: Json = {"id": f"x-{len(prompt)}", "object": kind, "created": len(prompt), "model": "demo"}
        skip = asked.get("skip_special_tokens") is not False
        text_stream = DecodeStream(ids=prompt, skip_special_tokens=skip)
        if chat:
            role: Json = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            first = {**head, "choices": [role | {"finish_reason": None}], "prompt_token_ids": prompt if ids else None}
            yield first | _usage(options, prompt, 0)
        for at in range(0, len(left), self.tokens_per_chunk):
            some = list(left[at : at + self.tokens_per_chunk])
            ended = at + len(some) == len(left)
            finish = None if not ended else "stop" if some[-1] == EOS else "length"
            told = some[:-1] if finish == "stop" else some
            text = "".join(text_stream.step(self.tokenizer, token) or "" for token in told)
            choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            choice["token_ids"] = some if ids else None
            if chat:
                choice["delta"] = {"content": text}
            else:
                choice |= {"text": text, "prompt_token_ids": prompt if ids and at == 0 else None}
            yield {**head, "choices": [choice]} | _usage(options, prompt, at + len(some))
        if options.get("include_usage"):
            yield {**head, "choices": [], "usage": _counts(len(prompt), len(left))}


def text_of(events: bytes) -> str:
    """What a client that collects the stream ends up with."""
    return "".join(
        choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        for chunk in chunks_of(events)
        for choice in chunk["choices"]
    )


def chunks_of(events: bytes) -> list[dict]:
    """All of a stream but its end."""
    return [json.loads(one[6:]) for one in events.split(b"\n\n") if one.startswith(b"data: {")]


def _counts(prompt: int, generated: int) -> Json:
    return {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}


def _usage(options: Mapping, prompt: Sequence[int], generated: int) -> Json:
    if not (options.get("include_usage") and options.get("continuous_usage_stats")):
        return {}
    return {"usage": _counts(len(prompt), generated)}
