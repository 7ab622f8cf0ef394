"""A fake for an attention replica: an instrument of benchmarks and tests, never part of a cluster.

It speaks the replica's private protocol (bearer token, /deepsplit/load, vLLM's OpenAI paths) and computes nothing:
tokens come at the times that a stated service model gives (`service_model.py` here), so that load can exceed by far
what this machine could compute, and two runs see the same replica. Tokens are a function of the ids before them: a
stream that is continued elsewhere can be checked for exactness.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from benchmarks.fakes.api import Answer, Asked, error
from benchmarks.fakes.service_model import Engine, Job, ServiceModel
from benchmarks.fakes.tokens import Continuation, block_hashes
from deployments.directory.members import ReplicaEndpoint
from deployments.hosting.http_server import HttpServer
from routing.requests.request import ReplicaLoad

LOAD_INTERVAL_S = 0.1
MODEL = "fake"


@dataclass
class _Sequence:
    """One choice of one request."""

    index: int
    continuation: Continuation
    tokens: asyncio.Queue[tuple[int, int, str | None]]  # choice, token, finish reason; shared by the request's choices
    ignore_eos: bool


class FakeReplicaApp:
    """One replica on a port of its own, on the running event loop."""

    def __init__(self, replica_id: str, service: ServiceModel, name: str = MODEL, eos_every: int | None = None) -> None:
        """`eos_every`: one token in so many ends its sequence; None: each runs to its bound."""
        self.replica_id = replica_id
        self.engine = Engine(service)
        self.token = secrets.token_urlsafe(16)
        self.generated_tokens = 0
        self._name = name
        self._eos_every = eos_every
        self._work = asyncio.Event()
        self._sequences: dict[Job, _Sequence] = {}
        self._server = HttpServer(self)
        self._stepping: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> ReplicaEndpoint:
        """Listen, and say where."""
        port = await self._server.start(host, port, "the fake's port")
        self._stepping = asyncio.create_task(self._step())
        return ReplicaEndpoint(self.replica_id, f"http://{host}:{port}", self.token, os.getpid(), "fake")

    async def stop(self) -> None:
        """At once: streams break off, as if the process had been killed."""
        assert self._stepping is not None
        self._stepping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._stepping
        await self._server.stop(0)

    def load(self) -> ReplicaLoad:
        """What it says of itself."""
        engine, model = self.engine, self.engine.model
        return ReplicaLoad(
            self.replica_id, model.slots, model.kv_cache_tokens, running=len(engine.running),
            waiting=len(engine.waiting), kv_cache_usage=engine.cache.usage,
        )  # fmt: skip

    # --- the engine, in real time ---

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        ends_s = 0.0
        while True:
            length_s = self.engine.begin_step()
            if length_s is None:
                self._work.clear()
                await self._work.wait()
                continue
            # From the planned end of the last step, so that late wake-ups do not slow the model down.
            now_s = loop.time()
            ends_s = (ends_s if now_s - ends_s < length_s else now_s) + length_s
            await asyncio.sleep(ends_s - loop.time())
            for job in self.engine.end_step():
                self._emit(job)

    def _emit(self, job: Job) -> None:
        sequence = self._sequences[job]
        token = sequence.continuation.next()
        finish = "length" if job.generated >= job.new_tokens else None
        if self._eos_every and not sequence.ignore_eos and token % self._eos_every == 0:
            if finish is None:
                self.engine.finish(job)
            finish = "stop"
        self.generated_tokens += 1
        sequence.tokens.put_nowait((sequence.index, token, finish))

    # --- HTTP ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        headers = dict(scope["headers"])
        sent = headers.get(b"authorization", b"")
        route = (scope["method"], scope["path"])
        if not hmac.compare_digest(sent, b"Bearer " + self.token.encode()):
            await _whole(send, 401, error(401, "no or wrong bearer token"))
        elif route == ("GET", "/deepsplit/load"):
            await _until_disconnect(self._loads(send), receive)
        elif route == ("GET", "/v1/models"):
            card = {"id": self._name, "object": "model", "created": 0, "owned_by": "fake"}
            await _whole(send, 200, msgspec.json.encode({"object": "list", "data": [card]}))
        elif route == ("GET", "/health"):
            await _whole(send, 200, b"")
        elif scope["method"] == "POST" and scope["path"] in ("/v1/completions", "/v1/chat/completions"):
            request_id = headers.get(b"x-request-id", uuid.uuid4().hex.encode()).decode("latin-1")
            await self._generate(await _body(receive), request_id, receive, send)
        else:
            await _whole(send, 404, error(404, f"{scope['method']} {scope['path']} is not known here"))

    async def _loads(self, send: Send) -> None:
        await _head(send, 200, b"application/x-ndjson")
        while True:
            await _part(send, msgspec.json.encode(self.load()) + b"\n")
            await asyncio.sleep(LOAD_INTERVAL_S)

    async def _generate(self, body: bytes, request_id: str, receive: Receive, send: Send) -> None:
        try:
            asked = msgspec.json.decode(body, type=Asked)
            prompts = asked.prompts()
            blocks = [block_hashes(prompt) for prompt in prompts]
        except (msgspec.DecodeError, ValueError, OverflowError) as wrong:
            await _whole(send, 400, error(400, str(wrong)))
            return
        tokens: asyncio.Queue[tuple[int, int, str | None]] = asyncio.Queue()
        jobs = [
            (Job(own, len(prompt), asked.new_tokens()), Continuation(prompt))
            for prompt, own in zip(prompts, blocks, strict=True)
            for _ in range(asked.n)
        ]
        if not all(self.engine.fits(job) for job, _ in jobs):
            await _whole(send, 400, error(400, "prompt and completion are longer than the KV cache"))
            return
        answer = Answer(asked, self._name, request_id, prompts)
        try:
            for index, (job, continuation) in enumerate(jobs):
                self._sequences[job] = _Sequence(index, continuation, tokens, asked.ignore_eos)
                self.engine.add(job)
            self._work.set()
            await _until_disconnect((_stream if asked.stream else _collect)(answer, tokens, len(jobs), send), receive)
        finally:
            for job, _ in jobs:
                self.engine.abort(job)
                del self._sequences[job]


async def _stream(answer: Answer, tokens: asyncio.Queue[tuple[int, int, str | None]], left: int, send: Send) -> None:
    await _head(send, 200, b"text/event-stream; charset=utf-8")
    while left:
        index, token, finish = await tokens.get()
        await _part(send, answer.chunks(index, token, finish))
        left -= finish is not None
    await _part(send, answer.end(), last=True)


async def _collect(answer: Answer, tokens: asyncio.Queue[tuple[int, int, str | None]], left: int, send: Send) -> None:
    found: list[list[int]] = [[] for _ in range(left)]
    reasons = [""] * left
    while left:
        index, token, finish = await tokens.get()
        found[index].append(token)
        if finish is not None:
            reasons[index] = finish
            left -= 1
    await _whole(send, 200, answer.whole(found, reasons))


async def _until_disconnect(work: Coroutine[None, None, None], receive: Receive) -> None:
    """Cancels the work when the client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _head(send: Send, status: int, content_type: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})


async def _part(send: Send, body: bytes, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _whole(send: Send, status: int, body: bytes) -> None:
    await _head(send, status, b"application/json")
    await _part(send, body, last=True)
