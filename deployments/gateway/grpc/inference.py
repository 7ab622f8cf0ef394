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
from deployments.gateway.grpc.call import RequestContext
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

    async def Chat(self, request: pb.ChatRequest, context: RequestContext) -> pb.ChatResponse:
        return chat_response(await context.ask(chat_body(request, stream=False)))

    async def ChatStream(self, request: pb.ChatRequest, context: RequestContext) -> None:
        async with aclosing(context.stream(chat_body(request, stream=True))) as events:
            async for data in events:
                await context.call.write(chat_chunk(data))

    async def Complete(self, request: pb.CompletionRequest, context: RequestContext) -> pb.CompletionResponse:
        return completion_response(await context.ask(completion_body(request, stream=False)))

    async def CompleteStream(self, request: pb.CompletionRequest, context: RequestContext) -> None:
        async with aclosing(context.stream(completion_body(request, stream=True))) as events:
            async for data in events:
                await context.call.write(completion_chunk(data))

    async def Tokenize(self, request: pb.TokenizeRequest, context: RequestContext) -> pb.TokenizeResponse:
        return tokenize_response(await context.ask(tokenize_body(request)))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: RequestContext) -> pb.DetokenizeResponse:
        return detokenize_response(await context.ask(detokenize_body(request)))

    async def ListModels(self, request: pb.ListModelsRequest, context: RequestContext) -> pb.ListModelsResponse:
        context.lease.status = 200
        return models_response(self._models.visible(context.lease.tenant))
