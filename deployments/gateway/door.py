"""The one path of every request, whatever protocol it came by: who asks, what is asked, may it run now, and where.

REST and gRPC hand it a `Call` and send on the `Answer`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Call:
    """One client request in the form that an attention replica understands: an HTTP request with a JSON body."""

    method: str
    path: str  # of the replica's OpenAI application, such as /v1/chat/completions
    body: bytes
    request_id: str
    key: str | None = field(default=None, repr=False)  # API key as the client sent it
    priority: str | None = None  # class that the client asked for; None: its tenant's default
    timeout_s: float | None = None  # how long the client will wait for the whole answer
    ttft_s: float | None = None  # how long it will wait for the first token


@dataclass(frozen=True)
class Answer:
    """What goes back. Chunks come as the replica made them, per token for streams (SSE).

    Closing `chunks` aborts the generation. Reading it may raise DeepsplitError after the first chunk.
    """

    status: int
    content_type: str
    headers: Mapping[str, str]
    chunks: AsyncGenerator[bytes, None]


class Door(Protocol):
    """See the module."""

    def arriving(self, path: str, key: str | None, request_id: str) -> AbstractContextManager[None]:
        """To be held while a request's body is read. Raises DeepsplitError for what would not be taken whatever it
        says: strangers and too many at once must not make the gateway hold their bodies.
        """
        ...

    async def answer(self, call: Call) -> Answer:
        """Raises DeepsplitError (any class at the door) for what is refused before its first byte."""
        ...

    def ready(self) -> Mapping[str, bool]:
        """Model name -> whether a request for it would find a replica now; all False while draining."""
        ...
