"""The pipeline over scripted replicas and the real admission: what a request meets on its way."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.errors import (
    DeepsplitError,
    Draining,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    PermissionDenied,
    Plane,
    QuotaExceeded,
    Reason,
    RequestError,
    RequestTimeout,
    Unauthenticated,
)
from cluster.keys.api_keys import key_hash, new_key
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint, ResponseHead
from deployments.gateway.head import Head, read_head
from tests.unit.deployments.gateway.gateway_world import (
    CHAT,
    COMPLETIONS,
    JSON,
    LOST,
    SSE,
    FakePool,
    Got,
    World,
    run,
    stream,
    text_of,
)


def refused(world: World, error: type[DeepsplitError], message: str, **asked: object) -> None:
    async def scenario() -> None:
        with pytest.raises(error, match=message):
            await world.ask(**asked)  # type: ignore[arg-type]
        assert world.pool.seen == []
        assert world.nothing_left()

    run(scenario)


def test_a_stream_passes_through_and_what_was_added_for_us_does_not() -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")]))
        got = await world.ask()
        assert (got.status, got.headers["x-request-id"]) == (200, "r1")
        assert float(got.headers["x-deepsplit-predicted-ttft-s"]) >= 0
        assert text_of(got.body) == "wxyz"
        assert got.body.endswith(b"data: [DONE]\n\n")
        assert b'token_ids":[' not in got.body
        assert world.nothing_left()

    run(scenario)


def test_an_answer_that_is_no_stream_passes_byte_for_byte() -> None:
    async def scenario() -> None:
        reply = b'{ "id":"x", "usage": {"prompt_tokens": 3, "completion_tokens": 2} , "choices":[] }'
        world = World(FakePool([JSON, reply[:9], reply[9:]]))
        assert (await world.ask(stream=False)).body == reply
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("after_chunks", [0, 1])
def test_a_client_that_leaves_frees_everything(after_chunks: int) -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")]))
        with pytest.raises(asyncio.CancelledError):
            await world.ask(leave_after=after_chunks)
        assert world.pool.closed == 1
        assert world.nothing_left()

    run(scenario)


def test_a_deadline_aborts_in_mid_stream() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool)
        with pytest.raises(RequestTimeout, match="longer than"):
            await world.ask(timeout_s=0.2)
        assert pool.closed == 1
        assert world.nothing_left()

    run(scenario)


def test_the_earlier_of_two_deadlines_holds() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(RequestTimeout):
            await world.ask(timeout_s=20.0, headers={"x-deepsplit-timeout-s": "0.1"})
        assert asyncio.get_running_loop().time() - began_s < 5

    run(scenario)


def test_draining_refuses_what_is_new_and_ends_what_runs_when_the_grace_is_over() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")], [SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool)
        quick = asyncio.create_task(world.ask())
        await pool.sending.wait()
        draining = asyncio.create_task(world.pipeline.open_requests.drain(5))
        await asyncio.sleep(0.05)
        assert world.pipeline.ready() == {"tiny": False}
        with pytest.raises(Draining):
            await world.ask()
        pool.hold.set()
        assert text_of((await quick).body) == "wxyz"  # within the grace
        await draining

        world = World(pool)
        pool.hold = asyncio.Event()
        slow = asyncio.create_task(world.ask())
        await asyncio.sleep(0.01)
        await world.pipeline.open_requests.drain(0.1)
        with pytest.raises(Draining, match="stopp"):
            await slow
        assert world.nothing_left()

    run(scenario)


def test_a_request_whose_deadline_passes_while_the_gateway_stops_ends_once() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool)
        slow = asyncio.create_task(world.ask(timeout_s=0.1))
        await pool.sending.wait()
        lease = next(iter(world.pipeline.open_requests._leases))
        assert lease._timeout is not None
        deadline_s = lease._timeout.when()
        assert deadline_s is not None
        error = Draining("stop", retry_after_s=1.0, plane=Plane.GATEWAY, reason=Reason.DRAINING)
        asyncio.get_running_loop().call_at(deadline_s, lease.cut, error)  # in the same turn, after the deadline itself
        with pytest.raises(RequestTimeout):
            await slow
        lease.cut(error)  # too late, and harmless
        await world.pipeline.open_requests.drain(0)
        assert world.nothing_left()

    run(scenario)


def test_hard_bounds() -> None:
    def world(**limits: object) -> World:
        return World(FakePool(), **limits)  # type: ignore[arg-type]

    refused(world(), RequestError, "not valid JSON", body=b"{")
    refused(world(), ModelNotFound, "'other' does not exist; this server has 'tiny'", model="other")
    refused(world(), ModelNotFound, "does not exist", path="/tokenize", body=b'{"model": "other"}')
    refused(world(), RequestError, "one of system, interactive, batch", headers={"x-deepsplit-priority": "urgent"})
    refused(world(max_prompt_tokens=2), RequestError, "has 3 tokens, this server's limit", prompt="one two three")
    refused(world(max_prompt_tokens=2), RequestError, "has 3 tokens", prompt=[1, 2, 3])
    refused(world(max_sequences=4), RequestError, r"5 sequences.*gateway\.max_sequences", n=5)
    refused(world(max_sequences=4), RequestError, "6 sequences", n="3", prompt=["a", "b"])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages"])
def test_a_prompt_beyond_the_context_is_the_requests_fault(path: str, stream: bool) -> None:
    text = "word " * 120
    fields: dict[str, object] = {
        COMPLETIONS: {"prompt": text},
        CHAT: {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
    }[path]
    world = World(FakePool(max_model_len=100))
    refused(world, RequestError, "maximum context length is 100 tokens", path=path, stream=stream, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[[1], [1] * 100], ["a", "word " * 120]])
def test_one_of_several_prompts_beyond_the_context_too(prompt: object) -> None:
    refused(World(FakePool(max_model_len=100)), RequestError, "maximum context length is 100", prompt=prompt)


def test_what_a_template_may_leave_out_is_the_engines_to_judge() -> None:
    async def scenario() -> None:
        turns = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ok", "reasoning_content": "word " * 120},
            {"role": "user", "content": "go on"},
        ]
        world = World(FakePool([SSE, *stream("wxyz")], max_model_len=100))
        got = await world.ask(CHAT, messages=turns, stream=True, metadata={"x": "word " * 120})
        assert got.status == 200

    run(scenario)


def test_cut_prompts_teach_nothing_about_the_size_of_texts() -> None:
    async def scenario() -> None:
        world = World(FakePool(*[[SSE, *stream("wxyz")]] * 20))
        before = world.pipeline._prompt_size.estimate(400_000, 0)
        for _ in range(20):
            await world.ask(prompt="x" * 100_000, truncate_prompt_tokens=9)
        assert world.pipeline._prompt_size.estimate(400_000, 0) == before

    run(scenario)


def test_token_ids_beyond_the_context_too() -> None:
    refused(World(FakePool(max_model_len=100)), RequestError, "maximum context length is 100", prompt=[1] * 100)


@pytest.mark.parametrize("cut", [-1, 50, "50"])
def test_a_prompt_that_is_to_be_cut_is_not_too_long(cut: object) -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")], max_model_len=100))
        assert text_of((await world.ask(prompt="word " * 120, truncate_prompt_tokens=cut)).body) == "wxyz"
        refusal = World(FakePool(max_model_len=100))
        with pytest.raises(RequestError, match="maximum context length"):
            await refusal.ask(prompt="word " * 120, truncate_prompt_tokens=110)

    run(scenario)


def test_json_that_can_be_read_but_not_written_again_leaves_nothing_behind() -> None:
    world = World(FakePool([SSE, *stream("x")]))

    async def scenario() -> None:
        # Where the reader's limit and the writer's lie apart depends on the stack: all depths around them.
        for depth in range(900, 1000):
            body = b'{"prompt": "a", "stream": true, "x": ' + b"[" * depth + b"]" * depth + b"}"
            with suppress(RequestError):
                await world.ask(body=body)
            world.pool.scripts = [[SSE, *stream("x")]]
            assert world.nothing_left()

    run(scenario)


def test_too_many_in_flight() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool, max_streams=1)
        first = asyncio.create_task(world.ask())
        await pool.sending.wait()
        with pytest.raises(Overloaded, match=r"gateway\.max_streams") as caught:
            await world.ask()
        assert (caught.value.plane, caught.value.reason) == ("gateway", "max_streams")
        pool.hold.set()
        await first
        assert world.nothing_left()

    run(scenario)


def test_bodies_are_bounded_all_together() -> None:
    async def scenario() -> None:
        pool = FakePool([SSE, *stream("wxyz")], [SSE, *stream("wxyz")])
        pool.hold = asyncio.Event()
        world = World(pool, max_bodies_mib=1, max_body_mib=1)
        large = asyncio.create_task(world.ask(metadata={"x": "y" * 700_000}))
        await pool.sending.wait()
        with pytest.raises(Overloaded, match=r"gateway\.max_bodies_mib") as caught:
            await world.ask(metadata={"x": "y" * 700_000})
        assert (caught.value.plane, caught.value.reason) == ("gateway", "bodies")
        pool.hold.set()
        await large
        assert world.nothing_left()
        await world.ask(metadata={"x": "y" * 700_000})

    run(scenario)


def test_requests_whose_bodies_arrive_count_as_held() -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("x")]), max_streams=2)
        head = read_head("POST", COMPLETIONS, {})
        async with world.pipeline.open(head), world.pipeline.open(read_head("POST", "/tokenize", {})):
            with pytest.raises(Overloaded, match="max_streams"):
                await world.ask()
        assert world.nothing_left()
        refusals = {"reason": "max_streams", "plane": "gateway", "class": "unknown"}
        assert world.value("deepsplit_refusals_total", **refusals) == 1

    run(scenario)


def test_strangers_and_those_who_come_too_late_send_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f'tenants:\n  - name: a\n    keys: ["{key_hash(new_key())}"]\n')
    keys.chmod(0o600)

    async def scenario() -> None:
        world = World(FakePool(), keys)
        with pytest.raises(Unauthenticated):
            async with world.pipeline.open(read_head("POST", COMPLETIONS, {"authorization": "Bearer ds-other"})):
                pytest.fail("a stranger was let in")
        assert world.nothing_left()
        open_to_all = World(FakePool())
        await open_to_all.pipeline.open_requests.drain(0)
        told = set()
        for _ in range(20):
            with pytest.raises(Draining) as caught:
                async with open_to_all.pipeline.open(read_head("POST", COMPLETIONS, {})):
                    pytest.fail("let in while draining")
            told.add(caught.value.retry_after_s)
        assert len(told) > 10, "all would come back at once"

    run(scenario)


def test_no_key_or_token_is_in_what_could_be_logged() -> None:
    secret = "ds-secret"
    for holder in (
        read_head("POST", "/", {"authorization": f"Bearer {secret}"}),
        Head("POST", "/", "r", secret),
        ReplicaEndpoint("r0", "http://x", secret, 1, "node"),
        AdmissionEndpoint("x:1", secret),
    ):
        assert secret not in repr(holder)


def test_no_replica_is_waited_for_within_the_objective() -> None:
    async def scenario() -> None:
        world = World(FakePool(names=""))
        assert world.pipeline.ready() == {"tiny": False}
        waiting = asyncio.create_task(world.ask(headers={"x-deepsplit-ttft-s": "0.2"}))
        await asyncio.sleep(0.3)
        world.admission.tick()
        with pytest.raises(NoCapacity, match="no attention replica"):
            await waiting
        assert world.nothing_left()

    run(scenario)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
def test_what_does_not_generate_tries_another_replica(path: str) -> None:
    async def scenario() -> None:
        world = World(FakePool([LOST], [JSON, b'{"count": 7, "input_tokens": 7}']))
        assert (await world.ask(path, prompt="abc", messages=[])).body == b'{"count": 7, "input_tokens": 7}'
        assert world.nothing_left()
        assert world.value("deepsplit_other_requests_total", path=path, outcome="ok") == 1

    run(scenario)


def test_further_names_of_the_model() -> None:
    async def scenario() -> None:
        for name in ("tiny", "gpt-4o", ""):
            world = World(FakePool([SSE, *stream("wxyz")]), models=("tiny", "gpt-4o"))
            assert text_of((await world.ask(model=name)).body) == "wxyz"
        assert world.pipeline.ready() == {"tiny": True, "gpt-4o": True}

    run(scenario)


def test_keys_models_classes_and_quotas(tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        f"tenants:\n  - name: small\n    keys: ['{key_hash(key)}']\n    classes: [batch]\n    requests_per_minute: 1\n"
        f"  - name: other\n    keys: []\n    models: [another]\n"
    )

    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")]), keys)
        for wrong in ({}, {"authorization": "Bearer "}, {"x-api-key": "ds-wrong"}):
            with pytest.raises(Unauthenticated):
                await world.ask(headers=wrong)
        mine = {"authorization": f"Bearer {key}"}
        with pytest.raises(PermissionDenied, match="'interactive'"):
            await world.ask(headers=mine | {"x-deepsplit-priority": "interactive"})
        got = await world.ask(headers=mine)
        assert got.headers["x-ratelimit-limit-requests"] == "1"
        with pytest.raises(QuotaExceeded) as caught:
            await world.ask(headers=mine)
        assert caught.value.plane == "quota"
        assert world.nothing_left()

    run(scenario)


def test_what_a_cancelled_answer_had_generated_is_charged(tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"tenants:\n  - name: small\n    keys: ['{key_hash(key)}']\n    tokens_per_minute: 100\n")

    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("x" * 60)], [SSE, *stream("wxyz")]), keys)
        mine = {"authorization": f"Bearer {key}"}
        with pytest.raises(asyncio.CancelledError):
            await world.ask(headers=mine, prompt=[1, 2, 3], max_tokens=60, leave_after=50)
        got = await world.ask(headers=mine, prompt=[1, 2, 3], max_tokens=4)
        left = int(got.headers["x-ratelimit-remaining-tokens"])
        assert 100 - 3 - 50 - 7 <= left <= 100 - 3 - 50 - 7 + 2  # some of it refills meanwhile

    run(scenario)


def test_what_the_engine_refused_is_not_charged(tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"tenants:\n  - name: small\n    keys: ['{key_hash(key)}']\n    tokens_per_minute: 100\n")

    async def scenario() -> None:
        refusal = [ResponseHead(400, "application/json"), b'{"error": {"message": "no --tool-call-parser"}}']
        world = World(FakePool(refusal, [SSE, *stream("wxyz")]), keys)
        mine = {"authorization": f"Bearer {key}"}
        got = await world.ask(headers=mine, prompt=[1] * 60, max_tokens=4)
        assert got.body == b'{"error": {"message": "no attention.engine_args.tool_call_parser"}}'
        got = await world.ask(headers=mine, prompt=[1, 2, 3], max_tokens=4)
        assert int(got.headers["x-ratelimit-remaining-tokens"]) == 93

    run(scenario)


def test_the_counts_are_learned_once_and_the_log_is_written_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World(FakePool([SSE, *stream("wxyz")]))
        learned: list[tuple[int, int]] = []
        world.pipeline._prompt_size.learn = lambda *seen: learned.append(seen)  # type: ignore[method-assign]
        got = Got()
        await world.ask(got=got)
        assert learned == [(2, len(PROMPT_IDS))]

    with caplog.at_level("INFO"):
        run(scenario)
    assert [r.message for r in caplog.records].count("request ended") == 1


PROMPT_IDS = [11, 12, 13]
