"""deepsplit.v1.Inference: our own gRPC service; the proto documents the methods."""

from __future__ import annotations

from contextlib import aclosing

from deployments.gateway.grpc.answers import (
    chat_chunk,
    chat_response,
    completion_chunk,
    completion_response,
    detokenize_response,
    models_response,
    tokenize_response,
)
from deployments.gateway.grpc.call import GrpcRequest
from deployments.gateway.grpc.requests import chat_body, completion_body, detokenize_body, tokenize_body
from deployments.gateway.models import ModelPages
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1 import inference_pb2_grpc

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What each method's request asks for.
PATHS = {
    "/deepsplit.v1.Inference/Chat": _CHAT,
    "/deepsplit.v1.Inference/ChatStream": _CHAT,
    "/deepsplit.v1.Inference/Complete": _COMPLETIONS,
    "/deepsplit.v1.Inference/CompleteStream": _COMPLETIONS,
    "/deepsplit.v1.Inference/Tokenize": "/tokenize",
    "/deepsplit.v1.Inference/Detokenize": "/detokenize",
    "/deepsplit.v1.Inference/ListModels": "/v1/models",
}


class Inference(inference_pb2_grpc.InferenceServicer):
    """Each method gets its message with the request's lease; those that stream write their answers themselves."""

    def __init__(self, models: ModelPages) -> None:
        self._models = models

    async def Chat(self, message: pb.ChatRequest, request: GrpcRequest) -> pb.ChatResponse:
        return chat_response(await request.ask(chat_body(message, stream=False)))

    async def ChatStream(self, message: pb.ChatRequest, request: GrpcRequest) -> None:
        async with aclosing(request.stream(chat_body(message, stream=True))) as events:
            async for data in events:
                await request.call.write(chat_chunk(data))

    async def Complete(self, message: pb.CompletionRequest, request: GrpcRequest) -> pb.CompletionResponse:
        return completion_response(await request.ask(completion_body(message, stream=False)))

    async def CompleteStream(self, message: pb.CompletionRequest, request: GrpcRequest) -> None:
        async with aclosing(request.stream(completion_body(message, stream=True))) as events:
            async for data in events:
                await request.call.write(completion_chunk(data))

    async def Tokenize(self, message: pb.TokenizeRequest, request: GrpcRequest) -> pb.TokenizeResponse:
        return tokenize_response(await request.ask(tokenize_body(message)))

    async def Detokenize(self, message: pb.DetokenizeRequest, request: GrpcRequest) -> pb.DetokenizeResponse:
        return detokenize_response(await request.ask(detokenize_body(message)))

    async def ListModels(self, message: pb.ListModelsRequest, request: GrpcRequest) -> pb.ListModelsResponse:
        request.lease.status = 200
        return models_response(self._models.visible(request.lease.tenant))
