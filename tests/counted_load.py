"""Requests whose number, ends and tokens are known: what the gateway's counters must say."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT = "def read_lines(path):\n"


@dataclass(frozen=True)
class Shot:
    """One request and how it must end."""

    key: str
    tenant: str
    priority: str = "interactive"  # `unknown` if it fails before that is found out
    stream: bool = False
    chat: bool = False
    outcome: str = "ok"
    status: int = 200
    patience_s: float | None = None  # how long it waits for its first token
    more: tuple[tuple[str, Any], ...] = ()  # further fields of its body

    def headers(self) -> dict[str, str]:
        """Key, class, patience."""
        asked = {"x-deepsplit-priority": self.priority} if self.priority != "unknown" else {}
        patience = {"x-deepsplit-ttft-s": f"{self.patience_s:g}"} if self.patience_s is not None else {}
        return {"Authorization": f"Bearer {self.key}", **asked, **patience}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        content = {"messages": [{"role": "user", "content": PROMPT}]} if self.chat else {"prompt": PROMPT}
        options = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {"model": "demo", "max_tokens": 12, "temperature": 0, **content, **options, **dict(self.more)}


@dataclass
class CountedLoad:
    """Sends to one gateway address and keeps the books."""

    url: str
    verify: Any
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (outcome, class, tenant)
    prompt_tokens: Counter[tuple[str, str]] = field(default_factory=Counter)  # (class, tenant)
    generated_tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send_all(self, shots: list[Shot], at_once: int) -> None:
        """Each on a connection of its own, so that they spread over gateways."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self.send, shots))

    def send(self, shot: Shot) -> None:
        """To its end."""
        path = "/v1/chat/completions" if shot.chat else "/v1/completions"
        with httpx.Client(verify=self.verify, timeout=120) as client:
            answer = client.post(f"{self.url}{path}", json=shot.body(), headers=shot.headers())
        assert answer.status_code == shot.status, answer.text
        with self._lock:
            self.requests[shot.outcome, shot.priority, shot.tenant] += 1
            if shot.status == 200:
                usage = _usage(answer.text, shot.stream)
                self.prompt_tokens[shot.priority, shot.tenant] += usage["prompt_tokens"]
                self.generated_tokens[shot.priority, shot.tenant] += usage["completion_tokens"]

    def tokenize(self, key: str) -> None:
        """One request that generates nothing."""
        body = {"model": "demo", "prompt": PROMPT}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{self.url}/tokenize", json=body, headers=headers, verify=self.verify, timeout=120)
        assert answer.status_code == 200, answer.text

    def leave(self, shot: Shot) -> None:
        """Close the connection in the middle of a stream."""
        body = shot.body() | {"max_tokens": 500, "ignore_eos": True}
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=shot.headers(), verify=self.verify, timeout=120) as answer:
            next(answer.iter_lines())
        self.requests["cancelled", shot.priority, shot.tenant] += 1


def _usage(text: str, stream: bool) -> dict[str, int]:
    if not stream:
        whole: dict[str, int] = json.loads(text)["usage"]
        return whole
    *_, last = (event["usage"] for event in _events(text) if event.get("usage"))
    return dict(last)


def _events(text: str) -> Iterator[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: "))
    return (json.loads(line) for line in lines if line != "[DONE]")
