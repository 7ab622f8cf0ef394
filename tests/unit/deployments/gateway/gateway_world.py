"""A whole pipeline over replicas that answer by script: real admission, real lease, real outline, nothing listens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from prometheus_client import CollectorRegistry

from cluster.config import AdmissionConfig, GatewayConfig
from cluster.errors import ReplicaLost
from deployments.admission.local import LocalAdmission
from deployments.admission.waiting_room import WaitingRoom
from deployments.directory.members import ResponseHead
from deployments.gateway.detokenizer import ModelTokenizer
from deployments.gateway.head import read_head
from deployments.gateway.meter import RequestMeter
from deployments.gateway.pipeline import Answer, Pipeline
from deployments.gateway.upstream.pool import ReplicaPool
from monitoring.metrics import GatewayMetrics
from routing.requests.quota import Quotas
from routing.requests.request import ReplicaLoad
from routing.requests.tenants import TenantsFile

SSE = ResponseHead(200, "text/event-stream; charset=utf-8")
JSON = ResponseHead(200, "application/json")
LOST = ReplicaLost("connection reset")
PROMPT = [11, 12, 13]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Script = Sequence[ResponseHead | bytes | Exception]


def event(token: int, first: bool = False, finish: str | None = None) -> bytes:
    """One chunk of a completion as vLLM streams it when asked for token ids."""
    choice: dict[str, object] = {"index": 0, "text": chr(token), "logprobs": None, "finish_reason": finish}
    choice |= {"stop_reason": None, "token_ids": [token], "prompt_token_ids": PROMPT if first else None}
    chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def stream(text: str, first: bool = True) -> list[bytes]:
    """A whole streamed completion, one token per character."""
    last = len(text) - 1
    events = [event(ord(c), first and i == 0, "length" if i == last else None) for i, c in enumerate(text)]
    return [*events, b"data: [DONE]\n\n"]


def text_of(body: bytes) -> str:
    """The text of a streamed completion or chat."""
    events = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    choices = [choice for one in events for choice in json.loads(one)["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


class FakePool:
    """In place of `ReplicaPool`: whichever replica is asked answers with the next script. An exception in a script is
    raised; `hold` stops after each item until it is set.
    """

    def __init__(self, *scripts: Script, names: str = "ab", max_model_len: int = 0) -> None:
        self.scripts = list(scripts)
        self.names = names
        self.max_model_len = max_model_len
        self.seen: list[tuple[str, str, bytes]] = []  # replica, path, body
        self.headers: list[Mapping[str, str]] = []
        self.closed = 0
        self.hold: asyncio.Event | None = None
        self.sending = asyncio.Event()  # a replica has been asked

    def loads(self) -> list[ReplicaLoad]:
        return [
            ReplicaLoad(name, max_num_seqs=4, kv_cache_tokens=10_000, max_model_len=self.max_model_len)
            for name in self.names
        ]

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        self.seen.append((replica_id, path, body))
        self.headers.append(headers)
        self.sending.set()
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, Exception):
                    raise item
                yield item
                if self.hold is not None:
                    await self.hold.wait()
                await asyncio.sleep(0)
        finally:
            self.closed += 1


class Words:
    """A tokenizer of words, and of characters as ids."""

    async def count(self, text: bytes, enough: int) -> int:
        return len(text.split())

    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


@dataclass
class Got:
    """What a client has of an answer."""

    head: Answer | None = None
    chunks: list[bytes] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)  # the first chunk did

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def status(self) -> int:
        assert self.head is not None
        return self.head.status

    @property
    def headers(self) -> Mapping[str, str]:
        assert self.head is not None
        return self.head.headers


class World:
    """A pipeline, its waiting room and its replicas."""

    def __init__(
        self,
        pool: FakePool,
        keys: Path | None = None,
        log_bodies: bool = False,
        models: tuple[str, ...] = ("tiny",),
        admission: AdmissionConfig | None = None,
        **limits: object,
    ) -> None:
        objectives = admission or AdmissionConfig()
        self.pool = pool
        self.room = WaitingRoom(time.monotonic)
        self.admission = LocalAdmission(objectives, time.monotonic, self.room.decided, Quotas())
        self.room.decide_by(self.admission)
        self.room.set_loads(pool.loads())
        self.config = GatewayConfig.model_validate({"max_resends": 2, **limits})
        self.registry = CollectorRegistry()
        self.pipeline = Pipeline(
            models,
            self.config,
            TenantsFile(keys),
            self.room,
            cast(ReplicaPool, pool),
            cast(ModelTokenizer, Words()),
            RequestMeter(GatewayMetrics(self.registry), objectives, time.monotonic, models[0]),
            log_bodies,
        )

    async def ask(
        self,
        path: str = COMPLETIONS,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        got: Got | None = None,
        leave_after: int | None = None,
        timeout_s: float | None = None,
        **fields: object,
    ) -> Got:
        """One request from beginning to end; `got` fills as chunks come. `leave_after`: so many chunks, then the
        client goes away.
        """
        got = Got() if got is None else got
        if body is None:
            asked = {"prompt": "ab", "max_tokens": 4, "stream": True} if path == COMPLETIONS else {}
            body = json.dumps(asked | fields).encode()
        head = read_head("POST", path, dict(headers or {}), timeout_s, request_id="r1")
        async with self.pipeline.open(head) as lease:
            lease.hold(len(body))
            outlined = await self.pipeline.outline(lease, body)
            async with self.pipeline.run(lease, outlined, body) as got.head:
                if leave_after == 0:
                    raise asyncio.CancelledError
                async for chunk in got.head.chunks:
                    got.chunks.append(chunk)
                    got.came.set()
                    if len(got.chunks) == leave_after:
                        raise asyncio.CancelledError
        return got

    def nothing_left(self) -> bool:
        """No ticket, no request, no body is held."""
        held = self.pipeline._memory.held_bytes
        return self.room.open_tickets() == 0 and len(self.pipeline.open_requests) == 0 and held == 0

    def value(self, name: str, **labels: str) -> float | None:
        """A metric's value; None if there is no such series."""
        return self.registry.get_sample_value(name, labels)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it on a loop of its own, within 30 s."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())
