"""API keys: how they are made, and what a keys file holds in their place."""

from __future__ import annotations

import hashlib
import re
import secrets

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
# Whatever looks like a key or a hash of one, for messages about files that people paste keys into.
_SECRET = re.compile(r"\bds-[\w-]{8,}|[0-9a-fA-F]{32,}")


def new_key() -> str:
    """A new key: `ds-` and 256 random bits."""
    return "ds-" + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """`sha256:` and 64 hex digits."""
    # A slow hash (bcrypt, argon2) protects passwords that can be guessed. 256 random bits cannot, at any speed, and
    # this runs for each request.
    return "sha256:" + hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def is_key_hash(text: str) -> bool:
    """Whether `text` is what `key_hash` returns."""
    return _HASH.fullmatch(text) is not None


def without_keys(text: str) -> str:
    """`text` with everything that looks like a key or a hash left out."""
    return _SECRET.sub("(not shown)", text)
