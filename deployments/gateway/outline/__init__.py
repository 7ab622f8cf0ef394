"""What admission and routing need to know of a request, read as the engine will read it."""

from deployments.gateway.outline.body import MAX_PARTS, Fields, nested_too_deeply, parse, too_many_parts
from deployments.gateway.outline.certain import certain_prompts
from deployments.gateway.outline.paths import COMPLETIONS_NEW_TOKENS, MAX_NEW_TOKENS, Outline, outline

__all__ = [
    "COMPLETIONS_NEW_TOKENS",
    "MAX_NEW_TOKENS",
    "MAX_PARTS",
    "Fields",
    "Outline",
    "certain_prompts",
    "nested_too_deeply",
    "outline",
    "parse",
    "too_many_parts",
]
