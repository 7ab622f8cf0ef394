"""The Open Inference Protocol with a plain client made from the published proto."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import grpc
import pytest

from cluster.errors import Overloaded, Plane, Reason, RequestError
from deployments.gateway.grpc.oip_text import read
from deployments.protos.inference import open_inference_pb2 as pb
from deployments.protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub as Stub
from tests.unit.deployments.gateway.grpc.grpc_server import (
    MODEL,
    Replicas,
    World,
    answering,
    gateway_config,
    keys_file,
    refused,
    run,
    served,
    status_of,
    streaming,
    token,
)

Input = pb.ModelInferRequest.InferInputTensor


def text(*prompts: bytes, shape: tuple[int, ...] | None = None) -> Input:
    contents = pb.InferTensorContents(bytes_contents=prompts)
    return Input(name="text_input", datatype="BYTES", shape=shape or (len(prompts),), contents=contents)


def flag(name: str, value: bool) -> Input:
    return Input(name=name, datatype="BOOL", shape=[1], contents=pb.InferTensorContents(bool_contents=[value]))


def infer(*inputs: Input, raw: list[bytes] | None = None, **parameters: object) -> pb.ModelInferRequest:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    typed = {name: pb.InferParameter(**{kinds[type(value)]: value}) for name, value in parameters.items()}  # type: ignore[arg-type]
    return pb.ModelInferRequest(
        model_name=MODEL, id="q1", inputs=inputs, parameters=typed, raw_input_contents=raw or []
    )


def framed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def completion(*texts: str) -> dict[str, object]:
    return {"choices": [{"index": i, "text": one, "finish_reason": "stop"} for i, one in enumerate(texts)]}


def test_readiness_and_metadata_need_no_key(tmp_path: Path) -> None:
    async def test() -> None:
        replicas = Replicas()
        async with served(World(replicas, gateway_config(), keys_file(tmp_path, a=""))) as channel:
            stub = Stub(channel)
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            for name, version, ready in (
                (MODEL, "", True), (MODEL, "1", True), ("alias", "", True), (MODEL, "2", False), ("x", "", False),
            ):  # fmt: skip
                answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
                assert answer.ready is ready, (name, version)
            assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "deepsplit"
            about = await stub.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
            assert (about.versions, about.platform) == (["1"], "vllm")
            assert [(one.name, one.datatype, list(one.shape)) for one in (about.inputs[0], *about.outputs)] == [
                ("text_input", "BYTES", [-1]), ("text_output", "BYTES", [-1]),
            ]  # fmt: skip
            error = await refused(stub.ModelMetadata(pb.ModelMetadataRequest(name="x")))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            replicas.names = ""
            assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
            assert not (await stub.ModelReady(pb.ModelReadyRequest(name=MODEL))).ready

    run(test())


def test_text_in_text_out() -> None:
    async def test() -> None:
        replicas = answering(completion("né"))
        async with served(replicas) as channel:
            request = infer(text("é".encode()), max_tokens=5, temperature=0.5, ignore_eos=True, stop="\n", priority=3)
            call = Stub(channel).ModelInfer(request, metadata=(("x-request-id", "other"),))
            answer = await call
            assert dict(await call.trailing_metadata()) == {"x-request-id": "q1"}
        assert (answer.model_name, answer.model_version, answer.id) == (MODEL, "1", "q1")
        output = answer.outputs[0]
        assert (output.name, output.datatype, list(output.shape)) == ("text_output", "BYTES", [1])
        assert list(output.contents.bytes_contents) == ["né".encode()]
        assert not answer.raw_output_contents
        assert replicas.body == {
            "model": MODEL, "prompt": "é", "stream": False, "max_tokens": 5, "temperature": 0.5, "ignore_eos": True,
            "stop": "\n",
        }  # fmt: skip
        assert (replicas.asked[0].path, replicas.asked[0].headers) == ("/v1/completions", {"x-request-id": "q1"})

    run(test())


def test_raw_contents_in_and_out() -> None:
    async def test() -> None:
        replicas = answering({"choices": list(reversed(completion("x", "yz")["choices"]))})  # type: ignore[call-overload]
        async with served(replicas) as channel:
            inputs = [
                Input(name="exclude_input_in_output", datatype="BOOL", shape=[1]),
                Input(name="text_input", datatype="BYTES", shape=[2, 1]),
                Input(name="sampling_parameters", datatype="BYTES", shape=[1]),
            ]
            raw = [b"\0", framed(b"a", b""), framed(json.dumps({"top_p": 0.5, "logit_bias": {"1": 2}}).encode())]
            answer = await Stub(channel).ModelInfer(infer(*inputs, raw=raw))
        assert list(answer.raw_output_contents) == [framed(b"x", b"yz")]
        assert list(answer.outputs[0].shape) == [2, 1]
        assert not answer.outputs[0].HasField("contents")
        assert replicas.body == {
            "model": MODEL, "prompt": ["a", ""], "stream": False, "echo": True, "top_p": 0.5, "logit_bias": {"1": 2},
        }  # fmt: skip

    run(test())


def raw_input(element: bytes, name: str = "text_input", datatype: str = "BYTES") -> pb.ModelInferRequest:
    return infer(Input(name=name, datatype=datatype, shape=[1]), raw=[element])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (infer(), "no prompt: give the input 'text_input'"),
        (infer(flag("stream", True)), "no prompt: give the input 'text_input'"),
        (infer(text()), "has 0 elements, but the shape"),
        (infer(text(b"a", shape=(2,))), r"has 1 elements, but the shape \[2\]"),
        (infer(text(b"a", shape=(-1, -1))), r"has 1 elements, but the shape \[-1, -1\]"),
        (infer(text(b"a"), text(b"b")), "the input 'text_input' is there twice"),
        (infer(text(b"\xff")), "'text_input' is not UTF-8: invalid start byte at byte 0"),
        (infer(Input(name="prompt", datatype="BYTES")), "no input 'prompt' of type 'BYTES', only text_input"),
        (infer(Input(name="text_input", datatype="FP32")), "no input 'text_input' of type 'FP32'"),
        (infer(text(b"a"), raw=[framed(b"a")]), "has contents beside raw_input_contents"),
        (infer(text(b"a"), raw=[b"", b""]), "raw_input_contents has 2 entries for 1 inputs"),
        (raw_input(b"\1\0\0"), "raw contents of the input 'text_input' end within an element"),
        (raw_input(b"\xff\xff\xff\xffa"), "raw contents of the input 'text_input' end within an element"),
        (infer(text(*[b""] * 1025)), "'text_input' has more than 1024 elements"),
        (raw_input(b"\0" * 4 * 2**20), "'text_input' has more than 1024 elements"),
        (infer(text(b"a"), prompt="b"), "the parameter 'prompt' cannot be set"),
        (infer(text(b"a"), echo=True), "the parameter 'echo' cannot be set"),
        (infer(text(b"a"), temperature=float("nan")), "'temperature' must be a finite number"),
        (infer(text(b"a"), stream="yes"), "'stream' must be true or false"),
        (
            pb.ModelInferRequest(inputs=[text(b"a")], parameters={"n": pb.InferParameter()}),
            "'n' has no value of a known type",
        ),
        (
            pb.ModelInferRequest(inputs=[text(b"a")], outputs=[{"name": "logits"}]),  # type: ignore[list-item]
            "no output 'logits', only 'text_output'",
        ),
    ],
)
def test_requests_that_are_not_valid(request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(request_)


@pytest.mark.parametrize("parameters", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_sampling_parameters_that_are_not_valid(parameters: bytes) -> None:
    contents = pb.InferTensorContents(bytes_contents=[parameters])
    with pytest.raises(RequestError, match="sampling_parameters"):
        read(infer(text(b"a"), Input(name="sampling_parameters", datatype="BYTES", shape=[1], contents=contents)))


def test_errors_of_model_infer() -> None:
    async def test() -> None:
        async with served(answering({"error": {"message": "too long"}}, 400)) as channel:
            stub = Stub(channel)
            assert status_of(await refused(stub.ModelInfer(infer(text(b"a"))))) == (
                grpc.StatusCode.INVALID_ARGUMENT, "too long",
            )  # fmt: skip
            other = pb.ModelInferRequest(model_name=MODEL, model_version="7", inputs=[text(b"a")])
            assert (await refused(stub.ModelInfer(other))).code() is grpc.StatusCode.NOT_FOUND
            error = await refused(stub.ModelInfer(infer(text(b"a"), flag("stream", True))))
            assert status_of(error) == (
                grpc.StatusCode.INVALID_ARGUMENT, "ModelInfer answers once: use ModelStreamInfer to stream",
            )  # fmt: skip

    run(test())


def test_a_stream_of_tokens() -> None:
    async def test() -> None:
        replicas = streaming(token("a"), token("b", "stop"), {"choices": []})
        async with served(replicas) as channel:
            once = infer(text(b"p"), triton_enable_empty_final_response=True)
            whole = infer(text(b"p"))
            call = Stub(channel).ModelStreamInfer(iter([once, whole]))
            answers = [answer.infer_response async for answer in call]
        assert [one.outputs[0].contents.bytes_contents[0] for one in answers if one.outputs] == [b"a", b"b"] * 2
        final = "triton_final_response"
        assert [one.parameters[final].bool_param for one in answers] == [False, False, True, False, False]
        assert answers[1].parameters["finish_reason"].string_param == "stop"
        assert not answers[2].outputs
        assert "triton_enable_empty_final_response" not in replicas.body
        assert replicas.body["stream"] is True

    run(test())


def test_a_stream_that_is_asked_for_whole_answers() -> None:
    async def test() -> None:
        replicas = answering(completion("ab"))
        async with served(replicas) as channel:
            call = Stub(channel).ModelStreamInfer(iter([infer(text(b"p"), flag("stream", False))]))
            answers = [answer.infer_response async for answer in call]
        assert [list(one.outputs[0].contents.bytes_contents) for one in answers] == [[b"ab"]]
        assert replicas.body["stream"] is False

    run(test())


def test_an_error_does_not_end_the_stream_of_requests() -> None:
    async def test() -> None:
        replicas = Replicas(error=Overloaded("busy", retry_after_s=1, plane=Plane.ATTENTION, reason=Reason.TTFT))
        async with served(replicas) as channel:
            call = Stub(channel).ModelStreamInfer(iter([infer(text(b"p")), infer()]))
            answers = [answer async for answer in call]
        assert [(one.error_message, one.infer_response.id) for one in answers] == [
            ("busy", "q1"), ("the request has no prompt: give the input 'text_input'", "q1"),
        ]  # fmt: skip

    run(test())


def test_leaving_a_stream_aborts_its_generation() -> None:
    async def test() -> None:
        replicas = streaming(completion("a"), hold=True)
        async with served(replicas) as channel:
            call = Stub(channel).ModelStreamInfer(iter([infer(text(b"p"))]))
            await call.read()
            call.cancel()
            await replicas.closed.wait()

    run(test())
