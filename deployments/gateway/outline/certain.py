"""What surely reaches the model of a request: a lower bound, where the outline's own text is an upper one.

A chat template may leave out earlier reasoning, unknown fields and much else; it always shows the contents of messages.
Only for what is more than the context by this bound may the gateway itself say that it does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.gateway.outline.body import Fields
from deployments.gateway.outline.paths import Outline
from deployments.gateway.outline.prompt import without_billing_header
from deployments.gateway.paths import COMPLETIONS, RESPONSES


def certain_prompts(path: str, outlined: Outline) -> tuple[int, list[bytes]]:
    """Length of the longest prompt of token ids (0: none is), and each prompt of text as UTF-8."""
    prompt = outlined.fields.get("prompt")
    if path != COMPLETIONS:
        return outlined.prompt_ids, [] if outlined.prompt_ids else [b"\n".join(_contents(path, outlined.fields))]
    if not isinstance(prompt, list):
        return 0, [prompt.encode()] if isinstance(prompt, str) else []
    if outlined.prompts == 1 and outlined.prompt_ids:
        return outlined.prompt_ids, []
    longest = max((len(one) for one in prompt if isinstance(one, list)), default=0)
    return longest, [one.encode() for one in prompt if isinstance(one, str)]


def _contents(path: str, fields: Fields) -> Iterator[bytes]:
    turns = fields.get("input" if path == RESPONSES else "messages")
    for turn in turns if isinstance(turns, list) else [{"content": turns}]:
        content = turn.get("content") if isinstance(turn, dict) else None
        is_system = isinstance(turn, dict) and turn.get("role") == "system"
        for part in content if isinstance(content, list) else [{"text": content}]:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                yield (without_billing_header(text) if is_system else text).encode()
