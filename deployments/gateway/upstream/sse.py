"""Server-sent events, wherever the network cut them: the one place where they are taken apart."""

from __future__ import annotations

import re

CONTENT_TYPE = "text/event-stream"
DONE = b"[DONE]"
_END = re.compile(rb"\r?\n\r?\n")
_DATA = b"data:"


class EventSplitter:
    """Collects the pieces of one stream and gives its whole events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that are complete with this chunk, without the empty line that ends each."""
        if b"\n" not in chunk:  # within a huge event, which is not searched again and again
            self._rest += chunk
            return []
        *events, self._rest = _END.split(self._rest + chunk)
        return events


def data_of(event: bytes) -> bytes | None:
    """What follows `data:` in an event; None for a comment that only keeps the connection alive."""
    at = data_at(event)
    return None if at is None else event[at:].strip()


def data_at(event: bytes) -> int | None:
    """Where an event's data begins."""
    if event.startswith(_DATA):
        return len(_DATA)
    at = event.find(b"\n" + _DATA)
    return None if at < 0 else at + 1 + len(_DATA)
