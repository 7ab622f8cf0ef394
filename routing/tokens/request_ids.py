"""The ids of the requests that an engine step computes, for log lines on both ends of the expert plane."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

MAX_BYTES = 255  # in UTF-8: a frame gives its length in one byte
_MORE = "…"

# Ids, as `join_request_ids` writes them, of the engine step that this thread computes; empty outside one.
STEP_REQUEST_IDS: ContextVar[str] = ContextVar("STEP_REQUEST_IDS", default="")


def join_request_ids(request_ids: Iterable[str]) -> str:
    """The ids joined by commas; an ellipsis stands for those beyond MAX_BYTES. Characters that could break a log line
    become `?`, because clients may choose their ids.
    """
    whole = "".join(char if char.isprintable() else "?" for char in ",".join(request_ids))
    raw = whole.encode()
    if len(raw) <= MAX_BYTES:
        return whole
    kept = raw[: MAX_BYTES - len(_MORE.encode())].decode(errors="ignore")
    at = kept.rfind(",") + 1  # half an id would find nothing
    return (kept[:at] or kept) + _MORE
