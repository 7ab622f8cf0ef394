"""The gRPC API with real clients on real sockets, over the real pipeline and replicas that answer by script."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.errors import StartupError
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1.inference_pb2_grpc import InferenceStub
from tests.certificates import Authority, public
from tests.unit.deployments.gateway.grpc.grpc_server import (
    CONTEXT,
    MODEL,
    Replicas,
    World,
    answering,
    gateway_config,
    key,
    keys_file,
    refused,
    run,
    served,
    streaming,
    tls_config,
    token,
)

HEAD = {"id": "r1", "created": 17, "model": MODEL}
USAGE = {"prompt_tokens": 2, "total_tokens": 4, "completion_tokens": 2}
PROMPT = pb.CompletionRequest(text="once")


# --- what goes through ---


def test_chat() -> None:
    async def test() -> None:
        message = {"role": "assistant", "content": "hi", "reasoning": "hm"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        replicas = answering(HEAD | {"choices": [choice], "usage": USAGE})
        async with served(replicas) as channel:
            request = pb.ChatRequest(model=MODEL, messages=[pb.Message(role="user", content="é")])
            answer = await InferenceStub(channel).Chat(request)
        assert answer.choices[0].message == pb.Message(role="assistant", content="hi", reasoning="hm")
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "stop")
        assert replicas.asked[0].path == "/v1/chat/completions"
        assert replicas.body == {"model": MODEL, "messages": [{"role": "user", "content": "é"}], "stream": False}
        assert replicas.closed.is_set()

    run(test())


def test_chat_stream() -> None:
    async def test() -> None:
        deltas = [{"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "hi"}]
        events = [HEAD | {"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        replicas = streaming(*events, HEAD | {"choices": [], "usage": USAGE})
        async with served(replicas) as channel:
            chunks = [chunk async for chunk in InferenceStub(channel).ChatStream(pb.ChatRequest())]
        assert [chunk.choices[0].delta.content for chunk in chunks[:3]] == ["", "", "hi"]
        assert (chunks[1].choices[0].delta.reasoning, chunks[3].usage.total_tokens) == ("hm", 4)
        assert replicas.body["stream"] is True
        assert replicas.closed.is_set()

    run(test())


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_complete_stream(loop_factory: type[asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        replicas = streaming(token("a"), token("b", "length"))
        async with served(replicas) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT, metadata=(("x-request-id", "mine"),))
            assert dict(await call.initial_metadata())["x-request-id"] == "mine"
            chunks = [chunk async for chunk in call]
        assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
            ("a", ""), ("b", "length"),
        ]  # fmt: skip

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(test(), 60))


def test_each_token_is_sent_as_it_comes() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), hold=True)
        async with served(replicas) as channel:
            call = InferenceStub(channel).CompleteStream(PROMPT)
            assert (await call.read()).choices[0].text == "a"
            assert not replicas.closed.is_set()

    run(test())


def test_complete(tmp_path: Path) -> None:
    async def test() -> None:
        replicas = answering(token("b", "stop"))
        world = World(replicas, gateway_config(), keys_file(tmp_path, small="requests_per_minute: 60"))
        async with served(world) as channel:
            call = InferenceStub(channel).Complete(PROMPT, metadata=(("x-request-id", "mine"), *key("small")))
            assert (await call).choices[0].text == "b"
            seen = dict(await call.trailing_metadata())
        assert (seen.pop("x-ratelimit-reset-requests"), seen) == ("1.0s", {
            "x-request-id": "mine", "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59",
        })  # fmt: skip
        assert replicas.asked[0].headers["x-request-id"] == "mine"
        assert world.requests("ok") == 1

    run(test())


def test_tokens_and_models() -> None:
    async def test() -> None:
        async with served(answering({"count": 1, "max_model_len": 64, "tokens": [5]})) as channel:
            assert list((await InferenceStub(channel).Tokenize(pb.TokenizeRequest(text="a"))).tokens) == [5]
        async with served(answering({"prompt": "a"})) as channel:
            assert (await InferenceStub(channel).Detokenize(pb.DetokenizeRequest(tokens=[5]))).text == "a"

    run(test())


def test_models_are_known_without_asking_a_replica() -> None:
    async def test() -> None:
        async with served(replicas := Replicas()) as channel:
            answer = await InferenceStub(channel).ListModels(pb.ListModelsRequest())
        assert list(answer.models) == [
            pb.Model(id=name, created=17, owned_by="deepsplit", max_model_len=CONTEXT) for name in (MODEL, "alias")
        ]
        assert replicas.asked == []

    run(test())


# --- bounds, health, reflection, TLS, ports ---


def test_a_message_over_the_bound() -> None:
    async def test() -> None:
        replicas = answering(token("a"))
        async with served(World(replicas, gateway_config(max_body_mib=1))) as channel:
            stub = InferenceStub(channel)
            error = await refused(stub.Complete(pb.CompletionRequest(text="a " * 2**19)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert replicas.asked == []
            error = await refused(stub.Complete(pb.CompletionRequest(text="a " * (2**19 - 50))))
            assert "maximum context length" in error.details()  # it was read

    run(test())


def test_metadata_over_the_bound() -> None:
    async def test() -> None:
        replicas = answering(token("a"))
        async with served(replicas) as channel:
            error = await refused(InferenceStub(channel).Complete(PROMPT, metadata=(("x-filler", "a" * 20_000),)))
            assert (error.code(), replicas.asked) == (grpc.StatusCode.RESOURCE_EXHAUSTED, [])
            await InferenceStub(channel).Complete(PROMPT, metadata=(("x-filler", "a" * 10_000),))

    run(test())


def test_reflection_lists_and_describes() -> None:
    async def test() -> None:
        async with served(answering({})) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest
            asked = [ask(list_services=""), ask(file_containing_symbol="deepsplit.v1.Inference")]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
        assert {service.name for service in answers[0].list_services_response.service} == {
            "deepsplit.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }  # fmt: skip
        files = answers[1].file_descriptor_response.file_descriptor_proto
        assert any(b"ChatRequest" in file for file in files)

    run(test())


def test_health_needs_no_key_and_ends_with_the_server(tmp_path: Path) -> None:
    async def test() -> None:
        server = World(Replicas(), gateway_config(), keys_file(tmp_path, a="")).server()
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(server.stop(10))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            await stopping

    run(test())


def test_tls(tmp_path: Path) -> None:
    async def test() -> None:
        tls = Authority("ours").issue(tmp_path, "localhost")
        world = World(answering(token("a")), tls_config(public(tls)))
        async with served(world, ca_file=tls.ca_file) as channel:
            assert (await InferenceStub(channel).Complete(PROMPT)).choices[0].text == "a"

    run(test())


def test_gateways_share_a_port() -> None:
    async def test() -> None:
        first = World(Replicas(), gateway_config()).server()
        port = await first.start()
        second = World(Replicas(), gateway_config(port)).server()
        assert await second.start() == port
        await second.stop(0)
        await first.stop(0)

    run(test())


def test_a_port_of_another_program() -> None:
    async def test(port: int) -> None:
        server = World(Replicas(), gateway_config(port)).server()
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: .* in use; see gateway.grpc_port"):
            await server.start()
        await server.stop(0)

    with socket.create_server(("127.0.0.1", 0)) as other:
        run(test(other.getsockname()[1]))
