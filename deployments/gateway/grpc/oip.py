"""The Open Inference Protocol v2 (`inference.GRPCInferenceService`): readiness, metadata, text in and text out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version

from grpc.aio import ServicerContext

from cluster.errors import DeepsplitError, ModelNotFound, RequestError
from deployments.gateway.grpc.answers import message_of
from deployments.gateway.grpc.call import RequestContext, SessionContext
from deployments.gateway.grpc.errors import failure
from deployments.gateway.grpc.oip_text import DATATYPES, TEXT_INPUT, TEXT_OUTPUT, VERSION, TextRequest, read
from deployments.gateway.paths import COMPLETIONS
from deployments.gateway.pipeline import Pipeline
from deployments.protos.deepsplit.v1.inference_pb2 import CompletionChunk, CompletionResponse
from deployments.protos.inference import open_inference_pb2 as pb
from deployments.protos.inference import open_inference_pb2_grpc

PLATFORM = "vllm"
PATHS = {"/inference.GRPCInferenceService/ModelInfer": COMPLETIONS}
SESSIONS = {"/inference.GRPCInferenceService/ModelStreamInfer": COMPLETIONS}
_EXTENSIONS = ("model_stream_infer", "binary_tensor_data")


class OpenInference(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The proto documents the methods. Those that ask for text get their message with the request's lease."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._version = version("deepsplit")

    async def ServerLive(self, request: pb.ServerLiveRequest, context: ServicerContext) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: ServicerContext) -> pb.ServerReadyResponse:
        ready = self._pipeline.ready()
        return pb.ServerReadyResponse(ready=bool(ready) and all(ready.values()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: ServicerContext) -> pb.ModelReadyResponse:
        known = request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=known and self._pipeline.ready().get(request.name, False))

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: ServicerContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="deepsplit", version=self._version, extensions=_EXTENSIONS)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: ServicerContext
    ) -> pb.ModelMetadataResponse:
        if request.name not in self._pipeline.ready() or request.version not in ("", VERSION):
            raise ModelNotFound(f"the model {request.name!r} (version {request.version or VERSION!r}) does not exist")
        response = pb.ModelMetadataResponse(name=request.name, versions=[VERSION], platform=PLATFORM)
        for name, datatype in DATATYPES.items():
            response.inputs.add(name=name, datatype=datatype, shape=[-1 if name == TEXT_INPUT else 1])
        response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[-1])
        return response

    async def ModelInfer(self, request: pb.ModelInferRequest, context: RequestContext) -> pb.ModelInferResponse:
        context.named(request.id)
        asked = read(request)
        if asked.stream:
            raise RequestError("ModelInfer answers once: use ModelStreamInfer to stream")
        return await self._whole(asked, context)

    async def ModelStreamInfer(
        self, request_iterator: AsyncGenerator[pb.ModelInferRequest, None], context: SessionContext
    ) -> None:
        async for message in request_iterator:
            try:
                async with context.request(message.id, message.ByteSize()) as request:
                    await self._stream(read(message), request)
            except DeepsplitError as error:
                about = pb.ModelInferResponse(model_name=message.model_name, id=message.id)
                how = failure(error)
                await context.call.write(pb.ModelStreamInferResponse(error_message=how.message, infer_response=about))

    async def _stream(self, asked: TextRequest, request: RequestContext) -> None:
        if asked.stream is False:
            whole = await self._whole(asked, request)
            await request.call.write(pb.ModelStreamInferResponse(infer_response=whole))
        else:
            async with aclosing(request.stream(asked.body(stream=True), announce=False)) as events:
                async for data in events:
                    for choice in message_of(data, CompletionChunk()).choices:
                        response = asked.response([choice.text])
                        response.parameters["index"].int64_param = choice.index
                        if choice.finish_reason:
                            response.parameters["finish_reason"].string_param = choice.finish_reason
                        response.parameters["triton_final_response"].bool_param = False
                        await request.call.write(pb.ModelStreamInferResponse(infer_response=response))
        if asked.empty_final:
            final = pb.ModelInferResponse(model_name=asked.model, model_version=VERSION, id=asked.id)
            final.parameters["triton_final_response"].bool_param = True
            await request.call.write(pb.ModelStreamInferResponse(infer_response=final))

    async def _whole(self, asked: TextRequest, request: RequestContext) -> pb.ModelInferResponse:
        answer = message_of(await request.ask(asked.body(stream=False)), CompletionResponse())
        return asked.response([choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)])
