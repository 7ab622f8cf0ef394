"""The Open Inference Protocol v2 (`inference.GRPCInferenceService`): readiness, metadata, text in and text out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version

import grpc

from cluster.errors import DeepsplitError, ModelNotFound, RequestError
from deployments.gateway.door import Door
from deployments.gateway.grpc.answers import completion
from deployments.gateway.grpc.call import ask, ask_stream
from deployments.gateway.grpc.errors import ReplicaRefused, failure
from deployments.gateway.grpc.oip_text import DATATYPES, TEXT_INPUT, TEXT_OUTPUT, VERSION, TextRequest, read
from deployments.protos.inference import open_inference_pb2 as pb
from deployments.protos.inference import open_inference_pb2_grpc

PLATFORM = "vllm"
_COMPLETIONS = "/v1/completions"
_EXTENSIONS = ("model_stream_infer", "binary_tensor_data")


class OpenInference(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The proto documents the methods."""

    def __init__(self, door: Door, model: str) -> None:
        self._door = door
        self._model = model
        self._version = version("deepsplit")

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        ready = self._door.ready()
        return pb.ServerReadyResponse(ready=bool(ready) and all(ready.values()))

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        known = request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=known and self._door.ready().get(request.name, False))

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="deepsplit", version=self._version, extensions=_EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        if request.name != self._model or request.version not in ("", VERSION):
            raise ModelNotFound(f"the model {request.name!r} (version {request.version or VERSION!r}) does not exist")
        response = pb.ModelMetadataResponse(name=self._model, versions=[VERSION], platform=PLATFORM)
        for name, datatype in DATATYPES.items():
            response.inputs.add(name=name, datatype=datatype, shape=[-1 if name == TEXT_INPUT else 1])
        response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[-1])
        return response

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        asked = read(request)
        if asked.stream:
            raise RequestError("ModelInfer answers once: use ModelStreamInfer to stream")
        return await self._whole(asked, context)

    async def ModelStreamInfer(
        self, requests: AsyncGenerator[pb.ModelInferRequest, None], context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        async for request in requests:
            try:
                async with aclosing(self._responses(read(request), context)) as responses:
                    async for response in responses:
                        yield pb.ModelStreamInferResponse(infer_response=response)
            except (DeepsplitError, ReplicaRefused) as error:
                about = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
                yield pb.ModelStreamInferResponse(error_message=failure(error).message, infer_response=about)

    async def _responses(
        self, asked: TextRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        if asked.stream is False:
            yield await self._whole(asked, context)
        else:
            body = asked.body(stream=True)
            events = ask_stream(self._door, context, _COMPLETIONS, body, asked.id, announce=False)
            async with aclosing(events):
                async for data in events:
                    for choice in completion(data).choices:
                        response = asked.response([choice.text])
                        response.parameters["index"].int64_param = choice.index
                        if choice.finish_reason:
                            response.parameters["finish_reason"].string_param = choice.finish_reason
                        response.parameters["triton_final_response"].bool_param = False
                        yield response
        if asked.empty_final:
            final = pb.ModelInferResponse(model_name=asked.model, model_version=VERSION, id=asked.id)
            final.parameters["triton_final_response"].bool_param = True
            yield final

    async def _whole(self, asked: TextRequest, context: grpc.aio.ServicerContext) -> pb.ModelInferResponse:
        answer = completion(await ask(self._door, context, _COMPLETIONS, asked.body(stream=False), asked.id))
        return asked.response([choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)])
