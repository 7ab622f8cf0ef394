"""A request body's JSON, with a bound on what reading it may cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

import msgspec

from cluster.errors import RequestError

# Objects and lists, or pieces of prompt text, in one body: 8 MiB of `[]` would hold up every other request for seconds.
MAX_PARTS = 2**16
_STRING = re.compile(rb'(?s)"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)')  # matches whatever follows a quote: never looks twice
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Fields: TypeAlias = Mapping[str, object]


def parse(body: bytes) -> Fields:
    """The request's JSON object. Raises RequestError for anything else, and for more than MAX_PARTS parts.

    UTF-8, with or without a byte order mark. Of what the engine's more tolerant parser takes, it refuses UTF-16 and
    UTF-32, NaN and infinities (numbers above 1.8e308 too), and halves of surrogate pairs, at which the engine's
    tokenizer fails: no client that follows RFC 8259 sends the former, and the latter are emoji cut in two.
    """
    if _containers(body) > MAX_PARTS and _containers(_STRING.sub(b"", body)) > MAX_PARTS:
        raise too_many_parts()
    try:
        fields = msgspec.json.decode(body.removeprefix(_BYTE_ORDER_MARK))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the request body must be a JSON object, not {type(fields).__name__}")
    return fields


def nested_too_deeply() -> RequestError:
    """For JSON that could just be read, and cannot be written a few calls further down."""
    return RequestError("the request body is nested too deeply")


def too_many_parts() -> RequestError:
    """For a body with more than MAX_PARTS parts."""
    return RequestError(f"the request body has more than {MAX_PARTS} objects, lists and texts, this server's limit")


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")
