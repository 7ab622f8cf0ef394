"""Clients that stream greedy tokens without pause and know each token that must come. For `benchmarks.failover`."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.measuring.sse_client import ConnectionLost, Reply, connect

MODEL = "demo"
TOKENS = 400
_PROMPTS = ("def read_lines(path):\n", "class Stack:\n", "import json\n\n", "for index in range(10):\n")


@dataclass
class Tally:
    """What all clients have seen."""

    answered: int = 0  # to the last token, each one right
    failed: Counter[str] = field(default_factory=Counter)  # requests, by what the client saw
    token_times: list[list[float]] = field(default_factory=list)  # by stream, monotonic seconds


class Streams:
    """`clients` loops. Use as an async context manager; leaving it lets the last requests end."""

    def __init__(self, url: str, clients: int) -> None:
        self.tally = Tally()
        self._url = url
        self._clients = clients
        self._expected: dict[str, list[int]] = {}
        self._open: list[Reply] = []
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        for prompt in _PROMPTS:  # before anything fails
            self._expected[prompt] = _tokens(await self._ask(prompt))
        self._tasks = [asyncio.create_task(self._client(at)) for at in range(self._clients)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def longest_gaps(self, since_s: float, until_s: float) -> list[float]:
        """The longest time without a token between two moments, seconds, of each stream that was open at both."""
        gaps = []
        for times in self.tally.token_times:
            inside = [at_s for at_s in times if since_s < at_s < until_s]
            if times and times[0] < since_s and times[-1] > since_s:
                before = max(at_s for at_s in times if at_s <= since_s)
                after = min((at_s for at_s in times if at_s >= until_s), default=inside[-1] if inside else before)
                edges = [before, *inside, after]
                gaps.append(max(later - sooner for sooner, later in itertools.pairwise(edges)))
        return gaps

    def between_tokens(self, since_s: float, until_s: float) -> list[float]:
        """The times between two tokens of a stream, seconds, of all streams; of those that overlap that time."""
        return [
            later - sooner
            for times in self.tally.token_times
            for sooner, later in itertools.pairwise(times)
            if sooner < until_s and later > since_s
        ]

    async def _client(self, number: int) -> None:
        prompt = _PROMPTS[number % len(_PROMPTS)]
        while not self._stopping:
            try:
                reply = await self._ask(prompt)
            except ConnectionLost:
                self.tally.failed["connection lost"] += 1
                continue
            self.tally.token_times.append([at_s for at_s, _ in reply.events()])
            if reply.status != 200:
                self.tally.failed[f"status {reply.status}: {reply.body[:200].decode(errors='replace')}"] += 1
                await asyncio.sleep(0.2)
            elif b'"error"' in reply.body or not reply.done:
                self.tally.failed["error in the stream"] += 1
            elif _tokens(reply) != self._expected[prompt]:
                self.tally.failed["other tokens"] += 1
            else:
                self.tally.answered += 1

    async def _ask(self, prompt: str) -> Reply:
        body = {
            "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        async with await connect(self._url) as connection:
            return await asyncio.wait_for(connection.request("POST", "/v1/completions", json.dumps(body).encode()), 180)


def _tokens(reply: Reply) -> list[int]:
    return [
        token
        for _, event in reply.events()
        for choice in json.loads(event).get("choices", ())
        for token in choice.get("token_ids") or ()
    ]


def now_s() -> float:
    """The clock of all times here."""
    return time.monotonic()
