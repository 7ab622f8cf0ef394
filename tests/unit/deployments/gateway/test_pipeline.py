"""The door over scripted replicas and the real admission: what a request meets on its way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import AdmissionConfig, GatewayConfig
from cluster.errors import (
    DeepsplitError,
    Draining,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ReplicaUnavailable,
    RequestError,
    RequestTimeout,
    RequestTooLarge,
    StreamLost,
    Unauthenticated,
)
from cluster.keys.api_keys import key_hash, new_key
from deployments.admission.waiting_room import Gate, LocalAdmission
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint, ResponseHead
from deployments.gateway.door import Answer, Call
from deployments.gateway.meter import RequestMeters
from deployments.gateway.pipeline import GatewayDoor
from monitoring.metrics import GatewayMetrics
from routing.requests.request import ReplicaLoad
from routing.requests.tenants import TenantsFile

SSE = ResponseHead(200, "text/event-stream; charset=utf-8")
JSON = ResponseHead(200, "application/json")
PROMPT = [11, 12, 13]


def event(token: int, first: bool = False, finish: str | None = None) -> bytes:
    """One chunk of a completion as vLLM streams it when asked for token ids."""
    choice: dict[str, object] = {"index": 0, "text": chr(token), "logprobs": None, "finish_reason": finish}
    choice |= {"stop_reason": None, "token_ids": [token], "prompt_token_ids": PROMPT if first else None}
    chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def stream(text: str, first: bool = True) -> list[bytes]:
    last = len(text) - 1
    events = [event(ord(c), first and i == 0, "length" if i == last else None) for i, c in enumerate(text)]
    return [*events, b"data: [DONE]\n\n"]


Script = Sequence[ResponseHead | bytes | Exception]


class Fleet:
    """In place of `upstream.pool.Replicas`: whichever replica is asked answers with the next script.
    An exception in a script is raised; `hold` stops after each item until it is set.
    """

    def __init__(self, *scripts: Script, names: str = "ab") -> None:
        self.scripts = list(scripts)
        self.names = names
        self.seen: list[tuple[str, str, bytes]] = []  # replica, path, body
        self.closed = 0
        self.hold: asyncio.Event | None = None

    def loads(self) -> list[ReplicaLoad]:
        return [ReplicaLoad(name, max_num_seqs=4, kv_cache_tokens=10_000) for name in self.names]

    async def send(
        self, replica_id: str, method: str, path: str, body: bytes, request_id: str
    ) -> AsyncGenerator[ResponseHead | bytes, None]:
        self.seen.append((replica_id, path, body))
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

    async def count(self, text: bytes) -> int:
        return len(text.split())

    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


class World:
    """A door, its gate and its fleet."""

    def __init__(self, fleet: Fleet, keys: Path | None = None, log_bodies: bool = False, **limits: object) -> None:
        self.fleet = fleet
        self.gate = Gate(time.monotonic)
        admission = LocalAdmission(AdmissionConfig(), time.monotonic, self.gate.decided)
        self.gate.decide_by(admission)
        self.gate.fleet(fleet.loads())
        config = GatewayConfig.model_validate({"max_resends": 2, **limits})
        self.registry = CollectorRegistry()
        meters = RequestMeters(GatewayMetrics(self.registry), AdmissionConfig(), time.monotonic)
        self.door = GatewayDoor("tiny", config, TenantsFile(keys), self.gate, fleet, Words(), meters, log_bodies)

    def nothing_left(self) -> bool:
        return self.gate.open_tickets() == 0 and self.door.open_requests == 0


CALL = Call("POST", "/v1/completions", json.dumps({"prompt": "ab", "max_tokens": 4, "stream": True}).encode(), "r1")
LOST = ReplicaUnavailable("connection reset")


def call(**fields: object) -> Call:
    return replace(CALL, body=json.dumps({"prompt": "ab", "max_tokens": 4, "stream": True} | fields).encode())


async def whole(answer: Answer) -> bytes:
    async with aclosing(answer.chunks):
        return b"".join([chunk async for chunk in answer.chunks])


def text_of(body: bytes) -> str:
    events = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for one in events for choice in json.loads(one)["choices"])


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def refused(world: World, asked: Call, error: type[DeepsplitError], message: str) -> None:
    async def scenario() -> None:
        with pytest.raises(error, match=message):
            await world.door.answer(asked)
        assert world.nothing_left()

    run(scenario)


def test_a_stream_passes_through_and_what_was_added_for_us_does_not() -> None:
    async def scenario() -> None:
        world = World(Fleet([SSE, *stream("wxyz")]))
        answer = await world.door.answer(CALL)
        assert (answer.status, answer.headers["x-request-id"]) == (200, "r1")
        assert float(answer.headers["x-deepsplit-predicted-ttft-s"]) >= 0
        body = await whole(answer)
        assert text_of(body) == "wxyz"
        assert body.endswith(b"data: [DONE]\n\n")
        assert b'token_ids":[' not in body
        assert world.nothing_left()

    run(scenario)


def test_an_answer_that_is_no_stream_passes_byte_for_byte() -> None:
    async def scenario() -> None:
        reply = b'{ "id":"x", "usage": {"prompt_tokens": 3, "completion_tokens": 2} , "choices":[] }'
        world = World(Fleet([JSON, reply[:9], reply[9:]]))
        assert await whole(await world.door.answer(call(stream=False))) == reply
        assert world.nothing_left()

    run(scenario)


def test_the_engines_own_refusal_passes() -> None:
    async def scenario() -> None:
        world = World(Fleet([ResponseHead(400, "application/json"), b'{"error": {}}']))
        answer = await world.door.answer(CALL)
        assert (answer.status, await whole(answer)) == (400, b'{"error": {}}')
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize(
    "first",
    [[LOST], [SSE, LOST], [SSE], [ResponseHead(503, "application/json"), b"{}"], [ResponseHead(500, "text/plain")]],
)
def test_a_loss_before_the_first_chunk_is_never_seen(first: Script) -> None:
    async def scenario() -> None:
        fleet = Fleet(first, [SSE, *stream("wxyz")])
        world = World(fleet)
        assert text_of(await whole(await world.door.answer(CALL))) == "wxyz"
        assert sorted(replica for replica, *_ in fleet.seen) == ["a", "b"]  # not twice the same
        assert world.nothing_left()

    run(scenario)


def test_a_loss_in_mid_stream_goes_on_elsewhere_from_what_was_sent() -> None:
    async def scenario() -> None:
        rest = [event(ord("y")), event(ord("z"), finish="length"), b"data: [DONE]\n\n"]
        fleet = Fleet([SSE, *stream("wxyz")[:2], LOST], [SSE, *rest])
        world = World(fleet)
        body = await whole(await world.door.answer(CALL))
        assert text_of(body) == "wxyz"
        assert body.count(b"[DONE]") == 1
        continued = json.loads(fleet.seen[1][2])
        assert continued["prompt"] == [*PROMPT, ord("w"), ord("x")]
        assert continued["max_tokens"] == 2
        assert world.nothing_left()

    run(scenario)


def test_what_came_in_one_packet_with_the_engines_error_is_not_lost() -> None:
    async def scenario() -> None:
        error = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]\n\n'
        rest = [event(ord("y")), event(ord("z"), finish="length"), b"data: [DONE]\n\n"]
        world = World(Fleet([SSE, b"".join([*stream("wxyz")[:2], error])], [SSE, *rest]))
        body = await whole(await world.door.answer(CALL))
        assert text_of(body) == "wxyz"
        assert body.count(b"[DONE]") == 1
        assert world.nothing_left()

    run(scenario)


def test_what_cannot_go_on_exactly_says_why() -> None:
    async def scenario() -> None:
        world = World(Fleet([SSE, *stream("wxyz")[:2], LOST]))
        answer = await world.door.answer(call(seed=7, temperature=1.0))
        with pytest.raises(StreamLost, match="seed"):
            await whole(answer)
        assert world.nothing_left()

    run(scenario)


def test_the_resend_budget_is_kept() -> None:
    async def scenario() -> None:
        fleet = Fleet(*[[LOST]] * 9, names="abcd")
        world = World(fleet, max_resends=2)
        with pytest.raises(ReplicaUnavailable):
            await world.door.answer(CALL)
        assert len(fleet.seen) == 3
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("after_chunks", [0, 1])
def test_a_client_that_leaves_frees_everything(after_chunks: int) -> None:
    async def scenario() -> None:
        fleet = Fleet([SSE, *stream("wxyz")])
        world = World(fleet)
        answer = await world.door.answer(CALL)
        for _ in range(after_chunks):
            await anext(answer.chunks)
        await answer.chunks.aclose()
        assert fleet.closed == 1
        assert world.nothing_left()

    run(scenario)


def test_a_deadline_aborts_in_mid_stream() -> None:
    async def scenario() -> None:
        fleet = Fleet([SSE, *stream("wxyz")])
        fleet.hold = asyncio.Event()
        world = World(fleet)
        with pytest.raises(RequestTimeout, match=r"longer than 0\.2 s"):
            await whole(await world.door.answer(replace(CALL, timeout_s=0.2)))
        assert fleet.closed == 1
        assert world.nothing_left()

    run(scenario)


def test_draining_refuses_what_is_new_and_ends_what_runs_when_the_grace_is_over() -> None:
    async def scenario() -> None:
        fleet = Fleet([SSE, *stream("wxyz")], [SSE, *stream("wxyz")])
        world = World(fleet)
        quick = await world.door.answer(CALL)
        draining = asyncio.create_task(world.door.drain(0.5))
        await asyncio.sleep(0.05)
        assert world.door.ready() == {"tiny": False}
        with pytest.raises(Draining):
            await world.door.answer(CALL)
        assert text_of(await whole(quick)) == "wxyz"  # within the grace
        await draining

        world = World(fleet)
        fleet.hold = asyncio.Event()
        slow = asyncio.create_task(world.door.answer(CALL))
        await world.door.drain(0.1)
        with pytest.raises(Draining, match="stopp"):
            await slow
        assert world.nothing_left()

    run(scenario)


def test_hard_bounds() -> None:
    def world(**limits: object) -> World:
        return World(Fleet(), **limits)

    refused(world(max_body_mib=1), replace(CALL, body=b" " * (2**20 + 1)), RequestTooLarge, "1 MiB")
    refused(world(), replace(CALL, body=b"{"), RequestError, "not valid JSON")
    refused(world(), call(model="other"), ModelNotFound, "'other' does not exist; this server has 'tiny'")
    refused(world(), replace(CALL, path="/tokenize", body=b'{"model": "other"}'), ModelNotFound, "does not exist")
    refused(world(), replace(CALL, priority="urgent"), RequestError, "one of system, interactive, batch")
    refused(world(max_prompt_tokens=2), call(prompt="one two three"), RequestError, "has 3 tokens, this server's limit")
    refused(world(max_prompt_tokens=2), call(prompt=[1, 2, 3]), RequestError, "has 3 tokens")


def test_json_that_can_be_read_but_not_written_again_leaves_nothing_behind() -> None:
    world = World(Fleet([SSE, *stream("x")]))

    async def scenario() -> None:
        # Where the reader's limit and the writer's lie apart depends on the stack: all depths around them.
        for depth in range(900, 1000):
            asked = replace(CALL, body=b'{"prompt": "a", "stream": true, "x": ' + b"[" * depth + b"]" * depth + b"}")
            with suppress(RequestError):
                await whole(await world.door.answer(asked))
            world.fleet.scripts = [[SSE, *stream("x")]]
            assert world.nothing_left()

    run(scenario)


def test_too_many_in_flight() -> None:
    async def scenario() -> None:
        world = World(Fleet([SSE, *stream("wxyz")]), max_streams=1)
        first = await world.door.answer(CALL)
        with pytest.raises(Overloaded, match=r"gateway\.max_streams") as caught:
            await world.door.answer(CALL)
        assert (caught.value.plane, caught.value.reason) == ("gateway", "max_streams")
        await whole(first)

    run(scenario)


def test_bodies_that_arrive_count_as_held() -> None:
    world = World(Fleet([SSE, *stream("x")]), max_streams=2)
    with (
        world.door.arriving("/v1/completions", None, "r1"),
        world.door.arriving("/tokenize", None, "r1"),
        pytest.raises(Overloaded, match="max_streams"),
        world.door.arriving("/v1/completions", None, "r1"),
    ):
        pytest.fail("a third one was let in")
    with world.door.arriving("/v1/completions", None, "r1"):
        assert world.nothing_left()
    refusals = world.registry.get_sample_value(
        "deepsplit_refusals_total", {"reason": "max_streams", "plane": "gateway", "class": "unknown"}
    )
    assert refusals == 1


def test_strangers_and_those_who_come_too_late_send_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'tenants:\n  - name: a\n    keys: ["{key_hash(new_key())}"]\n')
    keys.chmod(0o600)
    world = World(Fleet(), keys)
    with pytest.raises(Unauthenticated), world.door.arriving("/v1/completions", "ds-other", "r1"):
        pytest.fail("a stranger was let in")

    async def scenario() -> None:
        open_to_all = World(Fleet())
        await open_to_all.door.drain(0)
        told = set()
        for _ in range(20):
            with pytest.raises(Draining) as caught, open_to_all.door.arriving("/v1/completions", None, "r1"):
                pytest.fail("let in while draining")
            told.add(caught.value.retry_after_s)
        assert len(told) > 10, "all would come back at once"

    run(scenario)


def test_no_key_or_token_is_in_what_could_be_logged() -> None:
    secret = "ds-secret"
    for holder in (
        replace(CALL, key=secret),
        ReplicaEndpoint("r0", "http://x", secret, 1, "node"),
        AdmissionEndpoint("x:1", secret),
    ):
        assert secret not in repr(holder)


def test_no_replica() -> None:
    world = World(Fleet(names=""))
    assert world.door.ready() == {"tiny": False}
    refused(world, replace(CALL, method="GET", path="/v1/models", body=b""), NoCapacity, "no attention replica")


def test_what_does_not_generate_tries_another_replica() -> None:
    async def scenario() -> None:
        world = World(Fleet([LOST], [JSON, b"{}"]))
        assert await whole(await world.door.answer(replace(CALL, method="GET", path="/v1/models", body=b""))) == b"{}"
        assert world.nothing_left()

    run(scenario)


def test_keys_models_classes_and_quotas(tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"tenants:\n  - name: small\n    keys: ['{key_hash(key)}']\n    classes: [batch]\n    requests_per_minute: 1\n"
        f"  - name: other\n    keys: []\n    models: [another]\n"
    )

    async def scenario() -> None:
        world = World(Fleet([SSE, *stream("wxyz")]), keys)
        for wrong in (None, "", "ds-wrong"):
            with pytest.raises(Unauthenticated):
                await world.door.answer(replace(CALL, key=wrong))
        mine = replace(CALL, key=key)
        with pytest.raises(PermissionDenied, match="'interactive'"):
            await world.door.answer(replace(mine, priority="interactive"))
        answer = await world.door.answer(mine)
        assert answer.headers["x-ratelimit-limit-requests"] == "1"
        await whole(answer)
        with pytest.raises(QuotaExceeded) as caught:
            await world.door.answer(mine)
        assert caught.value.plane == "quota"
        assert world.nothing_left()

    run(scenario)
