"""What the gateway reads of a request before it is admitted: model, size, bounds. vLLM validates all the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from cluster.errors import RequestError

# Reserved for a request that states no bound; what it really took is settled when it ends.
UNSTATED_NEW_TOKENS = 1024
COMPLETIONS_NEW_TOKENS = 16  # the OpenAI default of max_tokens for /v1/completions, which vLLM keeps
MAX_SEQUENCES = 1024
_BOUNDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")

Fields = Mapping[str, object]


@dataclass(frozen=True)
class Peek:
    """A generation request's outline. Fields of a type that vLLM will refuse are read as absent."""

    fields: Fields
    model: str | None
    stream: bool
    prompt_text: bytes  # what is fed to the model, in order; without the chat template
    prompt_ids: int  # token ids given as such
    max_new_tokens: int  # over all sequences
    sequences: int


def parse(body: bytes) -> Fields:
    """The request's JSON object. Raises RequestError for anything else."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the request body must be a JSON object, not {type(fields).__name__}")
    return fields


def model_of(fields: Fields) -> str | None:
    """The model that the request names. Raises RequestError if it is no string."""
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"`model` must be a string, not {type(model).__name__}")
    return model


def peek(path: str, fields: Fields) -> Peek:
    """Outline of a request for one of the paths that generate. Raises RequestError."""
    prompts, ids = _prompts(fields)
    asked = fields.get("n")
    n = asked if isinstance(asked, int) and not isinstance(asked, bool) and asked > 0 else 1
    sequences = n * max(1, prompts)
    if sequences > MAX_SEQUENCES:
        raise RequestError(f"{sequences} sequences in one request (n times prompts); the most is {MAX_SEQUENCES}")
    each = COMPLETIONS_NEW_TOKENS if path == "/v1/completions" else UNSTATED_NEW_TOKENS
    for name in _BOUNDS:
        bound = fields.get(name)
        if isinstance(bound, int) and not isinstance(bound, bool):
            each = max(0, bound)
            break
    return Peek(
        fields,
        model_of(fields),
        fields.get("stream") is True,
        b"\n".join(_text(fields)),
        ids,
        each * sequences,
        sequences,
    )


def _prompts(fields: Fields) -> tuple[int, int]:
    """Number of prompts, and of token ids in them."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return 1, 0
    if isinstance(prompt[0], int):
        return 1, len(prompt)
    return len(prompt), sum(len(one) for one in prompt if isinstance(one, list))


def _text(fields: Fields) -> Iterator[bytes]:
    """Prompt text, in the order in which a chat template would put it: tools first, then the turns."""
    if tools := fields.get("tools"):
        yield msgspec.json.encode(tools)
    for name in ("system", "instructions", "prompt", "messages", "input"):
        yield from _strings(fields.get(name))


def _strings(value: object) -> Iterator[bytes]:
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, list):
        if value and isinstance(value[0], int):
            yield msgspec.json.encode(value)
        else:
            for part in value:
                yield from _strings(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
