"""Errors of the engine name the keys of our configuration, where vLLM names flags of a command line that nobody has."""

from __future__ import annotations

import re

from cluster.config.engine_args import REFUSED
from cluster.config.vllm_arguments import EngineArguments

_FLAG = re.compile(rb"--([a-z][a-z0-9-]*[a-z0-9])")
_REFUSED = frozenset(name for names in REFUSED.values() for name in names)
_KEYS = {
    name.replace("_", "-").encode(): f"attention.engine_args.{name}".encode()
    for name in EngineArguments.__annotations__ if name not in _REFUSED
}  # fmt: skip
# What vLLM says of a setting without naming its flag -> the same with our key. A test holds these texts to vLLM's.
PHRASES = {
    b"with speculative decoding.": b"with speculative decoding (attention.speculative_tokens).",
    b"does not support speculative tokens": b"does not work with attention.speculative_tokens",
}


def in_our_words(body: bytes) -> bytes:
    """The JSON body of an error, or of an error event. What names no setting comes back as it was."""
    for theirs, ours in PHRASES.items():
        body = body.replace(theirs, ours)
    return _FLAG.sub(lambda flag: _KEYS.get(flag[1], flag[0]), body)
