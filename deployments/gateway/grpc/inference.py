"""deepsplit.v1.Inference: our own gRPC service; the proto documents the methods."""

from __future__ import annotations

from contextlib import aclosing

from google.protobuf.message import Message

from deployments.gateway.grpc.answers import detokenize_response, message_of, models_response
from deployments.gateway.grpc.call import RequestContext
from deployments.gateway.grpc.requests import chat_body, completion_body, detokenize_body, tokenize_body
from deployments.gateway.models import ModelPages
from deployments.gateway.paths import CHAT, COMPLETIONS, DETOKENIZE, MODELS, TOKENIZE
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1 import inference_pb2_grpc

# What each method's request asks for.
PATHS = {
    "/deepsplit.v1.Inference/Chat": CHAT,
    "/deepsplit.v1.Inference/ChatStream": CHAT,
    "/deepsplit.v1.Inference/Complete": COMPLETIONS,
    "/deepsplit.v1.Inference/CompleteStream": COMPLETIONS,
    "/deepsplit.v1.Inference/Tokenize": TOKENIZE,
    "/deepsplit.v1.Inference/Detokenize": DETOKENIZE,
    "/deepsplit.v1.Inference/ListModels": MODELS,
}


class Inference(inference_pb2_grpc.InferenceServicer):
    """Each method gets its message with the request's lease; those that stream write their answers themselves."""

    def __init__(self, models: ModelPages) -> None:
        self._models = models

    async def Chat(self, request: pb.ChatRequest, context: RequestContext) -> pb.ChatResponse:
        return message_of(await context.ask(chat_body(request, stream=False)), pb.ChatResponse())

    async def ChatStream(self, request: pb.ChatRequest, context: RequestContext) -> None:
        await _write_stream(context, chat_body(request, stream=True), pb.ChatChunk)

    async def Complete(self, request: pb.CompletionRequest, context: RequestContext) -> pb.CompletionResponse:
        answer = await context.ask(completion_body(request, stream=False))
        return message_of(answer, pb.CompletionResponse())

    async def CompleteStream(self, request: pb.CompletionRequest, context: RequestContext) -> None:
        await _write_stream(context, completion_body(request, stream=True), pb.CompletionChunk)

    async def Tokenize(self, request: pb.TokenizeRequest, context: RequestContext) -> pb.TokenizeResponse:
        return message_of(await context.ask(tokenize_body(request)), pb.TokenizeResponse())

    async def Detokenize(self, request: pb.DetokenizeRequest, context: RequestContext) -> pb.DetokenizeResponse:
        return detokenize_response(await context.ask(detokenize_body(request)))

    async def ListModels(self, request: pb.ListModelsRequest, context: RequestContext) -> pb.ListModelsResponse:
        context.lease.status = 200
        return models_response(self._models.visible(context.lease.tenant))


async def _write_stream(context: RequestContext, body: bytes, message: type[Message]) -> None:
    async with aclosing(context.stream(body)) as events:
        async for data in events:
            await context.call.write(message_of(data, message()))
