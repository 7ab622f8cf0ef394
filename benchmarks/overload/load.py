"""Streams of requests to one address, and what became of each: open loop (arrivals do not wait for answers) or closed.

Times are `time.monotonic` seconds, counted from when a request was due, not from when this process got round to it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.measuring.sse_client import Connection, ConnectionLost, Reply, connect


@dataclass(frozen=True)
class Arrival:
    """One request to be sent."""

    due_s: float  # after the start of the load
    tenant: str
    priority: str
    path: str
    body: bytes  # JSON that asks for a stream with `stream_options.include_usage`
    headers: Mapping[str, str]


@dataclass
class Sent:
    """One request that was sent."""

    arrival: Arrival
    due_s: float
    sent_s: float = 0.0
    ended_s: float | None = None  # None: cut off with the load
    status: int = 0
    token_s: list[float] = field(default_factory=list)  # when each token came
    predicted_ttft_s: float | None = None  # by admission, from when it got the request
    refusal: str | None = None  # reason
    failure: str | None = None  # neither answered, refused nor cut off

    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.token_s[0] - self.due_s if self.token_s else None

    def tpot_s(self) -> float | None:
        """Mean time per token after the first one, so far."""
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


class LoadClient:
    """Keeps connections for reuse."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[Connection] = []

    async def send(self, arrival: Arrival, due_s: float) -> Sent:
        """Send it now and wait for its end; cancelling goes away from it."""
        sent = Sent(arrival, due_s)
        try:
            connection = self._idle.pop() if self._idle else await connect(self._url)
        except OSError as error:
            sent.failure = f"no connection: {error.strerror}"
            return sent
        sent.sent_s = time.monotonic()
        try:
            reply = await connection.request("POST", arrival.path, arrival.body, arrival.headers)
        except ConnectionLost as error:
            sent.failure, sent.ended_s = str(error), time.monotonic()
        except asyncio.CancelledError:
            assert connection.reply is not None
            _read(sent, connection.reply)
            connection.abort()
        else:
            sent.ended_s = reply.ended_s
            _read(sent, reply)
            self._idle.append(connection)
        return sent

    def close(self) -> None:
        """Close idle connections."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()


async def open_loop(client: LoadClient, arrivals: Sequence[Arrival], seconds: float) -> list[Sent]:
    """Each arrival at its time; whatever still runs after `seconds` is cut off."""
    begun_s = time.monotonic()
    tasks = []
    for arrival in arrivals:
        await asyncio.sleep(begun_s + arrival.due_s - time.monotonic())
        tasks.append(asyncio.create_task(client.send(arrival, begun_s + arrival.due_s)))
    await asyncio.sleep(begun_s + seconds - time.monotonic())
    for task in tasks:
        task.cancel()
    # One that is cancelled before it had a connection has not been sent.
    return [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Sent)]


async def closed_loop(client: LoadClient, arrivals: Iterator[Arrival], at_once: int, seconds: float) -> list[Sent]:
    """`at_once` in flight for `seconds`; each is due when the one before it ended."""
    found: list[Sent] = []

    async def one() -> None:
        while True:
            task = asyncio.create_task(client.send(next(arrivals), time.monotonic()))
            try:
                found.append(await asyncio.shield(task))
            except asyncio.CancelledError:
                task.cancel()
                found.append(await task)
                raise

    tasks = [asyncio.create_task(one()) for _ in range(at_once)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


def _read(sent: Sent, reply: Reply) -> None:
    sent.status = reply.status
    if (predicted_s := reply.headers.get("x-deepsplit-predicted-ttft-s")) is not None:
        sent.predicted_ttft_s = float(predicted_s)
    if reply.status not in (0, 200):
        error = json.loads(reply.body)["error"]
        if reply.status in (429, 503):
            sent.refusal = str(error.get("reason") or error.get("code"))
        else:
            sent.failure = f"{reply.status}: {error.get('message')}"
        return
    for at_s, payload in reply.events():
        event = json.loads(payload)
        if "error" in event:
            sent.failure = str(event["error"].get("message"))
        elif event["choices"]:
            sent.token_s.append(at_s)
        else:  # the closing usage; an engine may have sent several tokens in one event
            several = event["usage"]["completion_tokens"] - len(sent.token_s)
            sent.token_s += sent.token_s[-1:] * several
    if sent.ended_s is not None and sent.failure is None and not reply.done:
        sent.failure = "the stream ended without [DONE]"
