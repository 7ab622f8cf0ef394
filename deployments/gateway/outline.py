"""What the gateway reads of a request before it is admitted: model, size, bounds. vLLM validates all the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from cluster.errors import RequestError

# Reserved for a request that states no bound; what it really took is settled when it ends.
UNSTATED_NEW_TOKENS = 1024
COMPLETIONS_NEW_TOKENS = 16  # the OpenAI default of max_tokens for /v1/completions, which vLLM keeps
MAX_SEQUENCES = 1024
MAX_NEW_TOKENS = 2**31 - 1  # of one sequence; what is asked beyond it is as good as no bound
# Objects and lists, or pieces of prompt text, in one body: 8 MiB of `[]` would hold up every other request for seconds.
MAX_PARTS = 2**16
_STRING = re.compile(rb'(?s)"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)')  # matches whatever follows a quote: never looks twice
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
    """The request's JSON object. Raises RequestError for anything else, and for more than MAX_PARTS parts."""
    if _containers(body) > MAX_PARTS and _containers(_STRING.sub(b"", body)) > MAX_PARTS:
        raise too_many_parts()
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
            each = min(max(0, bound), MAX_NEW_TOKENS)
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
        yield _encoded(tools)
    parts = [fields.get(name) for name in ("input", "messages", "prompt", "instructions", "system")]
    seen = 0
    while parts:  # a stack: nesting as deep as JSON allows would be too deep for calls
        seen += 1
        if seen > MAX_PARTS:
            raise too_many_parts()
        part = parts.pop()
        if isinstance(part, str):
            yield part.encode("utf-8", "surrogatepass")
        elif isinstance(part, list):
            if part and isinstance(part[0], int):
                yield _encoded(part)
            else:
                parts += reversed(part)
        elif isinstance(part, dict):
            parts += reversed(part.values())


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except RecursionError as error:
        raise nested_too_deeply() from error


def nested_too_deeply() -> RequestError:
    """For JSON that could just be read, and cannot be written a few calls further down."""
    return RequestError("the request body is nested too deeply")


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def too_many_parts() -> RequestError:
    """For a body with more than MAX_PARTS parts."""
    return RequestError(f"the request body has more than {MAX_PARTS} objects, lists and texts, this server's limit")
