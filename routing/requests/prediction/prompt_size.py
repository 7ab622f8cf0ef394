"""How many tokens a prompt has, as far as that can be known without the model's tokenizer.

The gateway must know before it admits, and must not spend milliseconds on a request that it may refuse: it learns the
model's bytes per token from what replicas report afterwards.
"""

from __future__ import annotations

_PRIOR_TOKENS_PER_BYTE = 0.3  # 3 to 4 bytes of English per token
_WEIGHT = 0.05  # of a new observation; about the last 20 requests count
_LEAST_PER_BYTE = 1 / 16  # prompts that the template drops or cuts say nothing about those of others
_TEMPLATE_TOKENS = 8  # what a chat template adds to a short request


class PromptSize:
    """Estimates prompt tokens from bytes, learning from each request that ended."""

    def __init__(self) -> None:
        self._tokens_per_byte = _PRIOR_TOKENS_PER_BYTE

    def estimate(self, text_bytes: int, token_ids: int) -> int:
        """Tokens of a prompt of `text_bytes` bytes of UTF-8 and `token_ids` ids given as such."""
        if token_ids:
            return token_ids
        return int(text_bytes * self._tokens_per_byte) + _TEMPLATE_TOKENS

    def learn(self, text_bytes: int, tokens: int) -> None:
        """A prompt of `text_bytes` had `tokens`, the template's included."""
        if text_bytes > 0 and tokens > _TEMPLATE_TOKENS:
            seen = max(_LEAST_PER_BYTE, min((tokens - _TEMPLATE_TOKENS) / text_bytes, 1.0))
            self._tokens_per_byte += _WEIGHT * (seen - self._tokens_per_byte)
