"""A replica is lost or its engine refuses: requests are sent again, continued or refused, as their clients expect."""

from __future__ import annotations

import asyncio
import json

import pytest

from cluster.errors import EngineKilled, NoCapacity, ReplicaUnavailable, StreamLost
from deployments.directory.members import ResponseHead
from tests.unit.deployments.gateway.gateway_world import (
    CHAT,
    COMPLETIONS,
    JSON,
    LOST,
    PROMPT,
    SSE,
    FakePool,
    Script,
    World,
    event,
    run,
    stream,
    text_of,
)

UNREACHED = ReplicaUnavailable("cannot be reached")
BAD = b'{"error":{"message":"Requested sample logprobs of 21","type":"BadRequestError","param":null,"code":400}}'
DONE = b"data: [DONE]\n\n"
CLIENT_ERROR = {"outcome": "client_error", "class": "interactive", "tenant": "anonymous"}


def refusal(body: bytes) -> bytes:
    spaced = json.dumps(json.loads(body)).encode()  # as the engine writes its events
    return b"data: " + spaced + b"\n\n" + DONE


@pytest.mark.parametrize(
    "first",
    [
        [UNREACHED],
        [LOST],
        [SSE, LOST],
        [SSE],
        [SSE, b": ping\n\n", LOST],
        [ResponseHead(503, "application/json"), b"{}"],
        [ResponseHead(500, "text/plain")],
        [SSE, refusal(b'{"error":{"message":"EngineCore died","code":500}}')],
    ],
)
def test_a_loss_before_the_first_token_is_never_seen(first: Script) -> None:
    async def scenario() -> None:
        pool = FakePool(first, [SSE, *stream("wxyz")])
        world = World(pool)
        assert text_of((await world.ask()).body) == "wxyz"
        assert sorted(replica for replica, *_ in pool.seen) == ["a", "b"]  # not twice the same
        assert world.nothing_left()

    run(scenario)


def test_what_a_lost_attempt_showed_is_forgotten() -> None:
    """An engine that dies after its first event and before its first token must not spoil the second replica's."""

    async def scenario() -> None:
        role = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        begun = b"data: " + json.dumps(role | {"prompt_token_ids": PROMPT}).encode() + b"\n\n"
        died = refusal(b'{"error":{"message":"EngineCore died","code":500}}')
        for end in ([LOST], [died], []):
            again = [
                b"data: " + json.dumps(role | {"id": "chatcmpl-2"}).encode() + b"\n\n",
                *(
                    b"data: "
                    + json.dumps(
                        {"id": "chatcmpl-2", "choices": [{"index": 0, "delta": {"content": c}, "token_ids": [7]}]}
                    ).encode()
                    + b"\n\n"
                    for c in "ok"
                ),
                DONE,
            ]
            pool = FakePool([SSE, begun, *end], [SSE, *again])
            world = World(pool)
            got = await world.ask(CHAT, messages=[{"role": "user", "content": "x"}], stream=True)
            assert text_of(got.body) == "ok"
            assert b"chatcmpl-1" not in got.body
            assert len(pool.seen) == 2
            assert world.nothing_left()

    run(scenario)


def test_a_loss_in_mid_stream_goes_on_elsewhere_from_what_was_sent() -> None:
    async def scenario() -> None:
        rest = [event(ord("y")), event(ord("z"), finish="length"), DONE]
        pool = FakePool([SSE, *stream("wxyz")[:2], LOST], [SSE, *rest])
        world = World(pool)
        got = await world.ask()
        assert text_of(got.body) == "wxyz"
        assert got.body.count(b"[DONE]") == 1
        continued = json.loads(pool.seen[1][2])
        assert continued["prompt"] == [*PROMPT, ord("w"), ord("x")]
        assert continued["max_tokens"] == 2
        assert world.nothing_left()

    run(scenario)


def test_a_chat_without_a_bound_goes_on_to_the_end_of_the_context() -> None:
    async def scenario() -> None:
        def chunk(text: str) -> bytes:
            choice = {"index": 0, "delta": {"content": text}, "token_ids": [ord(text)]}
            data = {"id": "c", "choices": [choice], "prompt_token_ids": PROMPT}
            return b"data: " + json.dumps(data).encode() + b"\n\n"

        rest = [event(ord("y")), event(ord("z"), finish="stop"), DONE]
        pool = FakePool([SSE, chunk("w"), chunk("x"), LOST], [SSE, *rest], max_model_len=500)
        got = await World(pool).ask(CHAT, messages=[{"role": "user", "content": "x"}], stream=True, temperature=0)
        assert text_of(got.body) == "wxyz"
        assert json.loads(pool.seen[1][2])["max_tokens"] == 500 - len(PROMPT) - 2

    run(scenario)


def test_what_came_in_one_packet_with_the_engines_error_is_not_lost() -> None:
    async def scenario() -> None:
        error = refusal(b'{"error": {"message": "EngineCore died", "code": 500}}')
        rest = [event(ord("y")), event(ord("z"), finish="length"), DONE]
        world = World(FakePool([SSE, stream("wxyz")[0], stream("wxyz")[1] + error], [SSE, *rest]))
        got = await world.ask()
        assert text_of(got.body) == "wxyz"
        assert got.body.count(b"[DONE]") == 1
        assert world.nothing_left()

    run(scenario)


def test_what_cannot_go_on_exactly_says_why() -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")[:2], LOST]))
        with pytest.raises(StreamLost, match="seed"):
            await world.ask(seed=7, temperature=1.0)
        assert world.nothing_left()

    run(scenario)


def test_the_resend_budget_is_kept() -> None:
    async def scenario() -> None:
        pool = FakePool(*[[UNREACHED]] * 9, names="abcd")
        world = World(pool, max_resends=2)
        with pytest.raises(ReplicaUnavailable):
            await world.ask()
        assert len(pool.seen) == 3
        assert world.nothing_left()

    run(scenario)


# --- a request that kills its engine ---


@pytest.mark.parametrize("stream_it", [True, False])
@pytest.mark.parametrize("death", [[LOST], [SSE, LOST], [SSE]])
def test_a_request_that_killed_two_engines_is_never_sent_to_a_third(
    death: Script, stream_it: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        pool = FakePool(death, death, [SSE, *stream("wxyz")], names="abcd")
        world = World(pool, max_resends=5)
        with pytest.raises(EngineKilled, match="not sent to a third"):
            await world.ask(stream=stream_it)
        assert len(pool.seen) == 2
        assert world.nothing_left()

    run(scenario)
    (said,) = (r for r in caplog.records if r.levelname == "ERROR")
    assert said.fields == {"request_id": "r1"}  # type: ignore[attr-defined]


def test_in_mid_stream_too() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, stream("wxyz")[0], LOST], [SSE, LOST], [SSE, DONE], names="abcd")
        world = World(pool, max_resends=5)
        with pytest.raises(EngineKilled):
            await world.ask()
        assert len(pool.seen) == 2

    run(scenario)


def test_a_replica_that_got_on_with_it_was_not_killed_by_it() -> None:
    async def scenario() -> None:
        rest = [event(ord("y")), event(ord("z"), finish="length"), DONE]
        pool = FakePool([SSE, stream("wxyz")[0], LOST], [SSE, event(ord("x")), LOST], [SSE, *rest], names="abcd")
        assert text_of((await World(pool, max_resends=5).ask()).body) == "wxyz"

    run(scenario)


def test_replicas_that_were_never_reached_were_not_killed() -> None:
    async def scenario() -> None:
        pool = FakePool([UNREACHED], [LOST], [UNREACHED], [SSE, *stream("wxyz")], names="abcd")
        assert text_of((await World(pool, max_resends=5).ask()).body) == "wxyz"

    run(scenario)


def test_two_engines_that_answer_500_are_as_good_as_lost() -> None:
    async def scenario() -> None:
        failed = [ResponseHead(500, "application/json"), b'{"error": 1}']
        pool = FakePool(failed, failed, [JSON, b"{}"], names="abcd")
        with pytest.raises(EngineKilled, match="answered 500"):
            await World(pool, max_resends=5).ask(stream=False)
        assert len(pool.seen) == 2

    run(scenario)


def test_replicas_that_take_nothing_were_not_killed() -> None:
    async def scenario() -> None:
        full = [ResponseHead(503, "application/json"), b"{}"]
        pool = FakePool(full, full, [JSON, b"{}"], names="abcd")
        assert (await World(pool, max_resends=5).ask(stream=False)).status == 200

    run(scenario)


def test_the_only_engines_own_error_is_the_answer() -> None:
    async def scenario() -> None:
        pool = FakePool([ResponseHead(500, "application/json"), b'{"error": 1}'], names="a")
        got = await World(pool, max_resends=5).ask(stream=False)
        assert (got.status, got.body) == (500, b'{"error": 1}')
        assert len(pool.seen) == 1

    run(scenario)


# --- a request that the engine refuses ---


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "events",
    [[refusal(BAD)], [b": ping\n\n" + refusal(BAD)[:40], refusal(BAD)[40:]], [b"event: error\n" + refusal(BAD)]],
)
def test_a_streamed_request_is_refused_as_one_that_is_not(path: str, events: list[bytes]) -> None:
    async def scenario() -> None:
        fields = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {}
        pool = FakePool([ResponseHead(400, "application/json"), BAD])
        whole = await World(pool).ask(path, stream=False, logprobs=21, **fields)  # type: ignore[arg-type]
        pool = FakePool([SSE, *events])
        world = World(pool)
        streamed = await world.ask(path, stream=True, logprobs=21, **fields)  # type: ignore[arg-type]
        assert (streamed.status, streamed.body) == (whole.status, whole.body) == (400, BAD)
        assert streamed.head is not None
        assert whole.head is not None
        assert (streamed.head.content_type, streamed.headers) == (whole.head.content_type, whole.headers)
        assert len(pool.seen) == 1  # one engine
        assert world.value("deepsplit_requests_total", **CLIENT_ERROR) == 1
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("broken", [[], [LOST]])
@pytest.mark.parametrize(
    ("path", "begun"),
    [
        ("/v1/responses", b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no"}}\n\n'),
    ],
)
def test_where_the_stream_does_not_say_why_the_engine_is_asked_without_one(
    path: str, begun: bytes, broken: Script
) -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, begun, *broken], [ResponseHead(400, "application/json"), BAD])
        world = World(pool)
        got = await world.ask(path, input="x", messages=[{"role": "user", "content": "x"}], max_tokens=9, stream=True)
        assert (got.status, got.body) == (400, BAD)
        assert [replica for replica, *_ in pool.seen] == [pool.seen[0][0]] * 2  # the same engine
        asked = json.loads(pool.seen[1][2])
        assert asked["stream"] is False
        assert 1 in (asked.get("max_tokens"), asked.get("max_output_tokens"))
        assert world.value("deepsplit_requests_total", **CLIENT_ERROR) == 1
        assert world.nothing_left()

    run(scenario)


def test_messages_without_a_model_go_on_elsewhere_too() -> None:
    async def scenario() -> None:
        start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":null}}\n\n'
        delta = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"x"}}\n\n'
        stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
        pool = FakePool([SSE, start, LOST], [UNREACHED], [SSE, start, delta, stop])
        world = World(pool)
        got = await world.ask("/v1/messages", messages=[{"role": "user", "content": "x"}], max_tokens=9, stream=True)
        assert got.body == start + delta + stop
        assert [json.loads(body)["model"] for _, _, body in pool.seen] == ["tiny"] * 3

    run(scenario)


def test_a_stream_of_responses_whose_replica_died_before_its_first_token_is_asked_for_elsewhere() -> None:
    async def scenario() -> None:
        created = b'event: response.created\ndata: {"type":"response.created","response":{"id":"%d"}}\n\n'
        delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
        done = b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":null}}\n\n'
        for asked_again in ([UNREACHED], [LOST], [JSON, b"{}"]):
            pool = FakePool([SSE, created % 1, LOST], asked_again, [SSE, created % 2, delta, done])
            got = await World(pool).ask("/v1/responses", input="x", stream=True)
            assert got.body == created % 2 + delta + done

    run(scenario)


def test_an_error_of_the_requests_own_in_mid_stream_is_passed_on_once() -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")[:2], refusal(BAD)]))
        got = await world.ask()
        assert text_of(got.body.replace(b"data: " + BAD + b"\n\n", b"")) == "wx"
        assert got.body.endswith(b"data: " + BAD + b"\n\n")
        assert len(world.pool.seen) == 1
        assert world.value("deepsplit_requests_total", **CLIENT_ERROR) == 1

    run(scenario)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_an_error_in_mid_stream_keeps_the_name_that_clients_look_for(path: str) -> None:
    async def scenario() -> None:
        delta = b'event: x\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'
        error = b'event: error\ndata: {"type":"error","error":{"message":"no","code":400}}\n\n'
        world = World(FakePool([SSE, delta, error]))
        got = await world.ask(path, input="x", messages=[{"role": "user", "content": "x"}], max_tokens=9, stream=True)
        assert got.body == delta + error

    run(scenario)


def test_a_moved_request_waits_for_a_replica_within_its_objective() -> None:
    async def scenario() -> None:
        pool = FakePool([LOST], names="a")
        world = World(pool)
        asking = asyncio.create_task(world.ask(headers={"x-deepsplit-ttft-s": "0.2"}))
        await pool.sending.wait()
        pool.names = ""
        world.room.set_loads([])
        await asyncio.sleep(0.3)
        world.admission.tick()
        with pytest.raises(NoCapacity):
            await asking
        assert world.nothing_left()

    run(scenario)
