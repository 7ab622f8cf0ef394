"""The gRPC server: deepsplit.v1, the Open Inference Protocol, health and reflection, all over one door."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster.config import GatewayConfig
from cluster.errors import StartupError
from cluster.tls.grpc_credentials import public_server_credentials
from deployments.gateway.door import Door
from deployments.gateway.grpc.answers import (
    chat_chunk,
    chat_response,
    completion_chunk,
    completion_response,
    detokenize_response,
    models_response,
    tokenize_response,
)
from deployments.gateway.grpc.bounds import Entrance
from deployments.gateway.grpc.call import ask, ask_stream
from deployments.gateway.grpc.health import Health
from deployments.gateway.grpc.interceptor import Edge
from deployments.gateway.grpc.oip import OpenInference
from deployments.gateway.grpc.requests import chat_body, completion_body, detokenize_body, tokenize_body
from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1 import inference_pb2_grpc
from deployments.protos.inference import open_inference_pb2, open_inference_pb2_grpc

READ_TIMEOUT_S = 60.0  # as for REST bodies
WRITE_STALL_S = 30.0  # as for REST
HEALTH_POLL_S = 0.5
_MAX_METADATA_BYTES = 16 * 1024
SIDE_CALLS = 256  # health, reflection and metadata, beyond the requests that gateway.max_streams allows
# A client whose host is gone is noticed within the two together; clients may ping as often as every 10 s.
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MIN_PING_MS = 10_000

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What each method asks the door for; all others need no key.
_PATHS = {
    "/deepsplit.v1.Inference/Chat": _CHAT,
    "/deepsplit.v1.Inference/ChatStream": _CHAT,
    "/deepsplit.v1.Inference/Complete": _COMPLETIONS,
    "/deepsplit.v1.Inference/CompleteStream": _COMPLETIONS,
    "/deepsplit.v1.Inference/Tokenize": "/tokenize",
    "/deepsplit.v1.Inference/Detokenize": "/detokenize",
    "/deepsplit.v1.Inference/ListModels": "/v1/models",
    "/inference.GRPCInferenceService/ModelInfer": _COMPLETIONS,
    "/inference.GRPCInferenceService/ModelStreamInfer": _COMPLETIONS,
}


class Inference(inference_pb2_grpc.InferenceServicer):
    """deepsplit.v1.Inference; the proto documents the methods."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> pb.ChatResponse:
        return chat_response(await ask(self._door, context, _CHAT, chat_body(request, stream=False)))

    async def ChatStream(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.ChatChunk, None]:
        async with aclosing(ask_stream(self._door, context, _CHAT, chat_body(request, stream=True))) as events:
            async for data in events:
                yield chat_chunk(data)

    async def Complete(self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext) -> pb.CompletionResponse:
        body = completion_body(request, stream=False)
        return completion_response(await ask(self._door, context, _COMPLETIONS, body))

    async def CompleteStream(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        body = completion_body(request, stream=True)
        async with aclosing(ask_stream(self._door, context, _COMPLETIONS, body)) as events:
            async for data in events:
                yield completion_chunk(data)

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        return tokenize_response(await ask(self._door, context, "/tokenize", tokenize_body(request)))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        return detokenize_response(await ask(self._door, context, "/detokenize", detokenize_body(request)))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        return models_response(await ask(self._door, context, "/v1/models", b""))


class GrpcServer:
    """Serves a door on gateway.host and gateway.grpc_port, on the running event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        model: str,
        door: Door,
        read_timeout_s: float = READ_TIMEOUT_S,
        write_stall_s: float = WRITE_STALL_S,
    ) -> None:
        self._config = config
        self._model = model
        self._door = door
        self._edge = Edge(Entrance(door, _PATHS, SIDE_CALLS), read_timeout_s, write_stall_s)
        self._health: Health | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port. Gateways on one node share it. Raises StartupError."""
        host, port = self._config.host, self._config.grpc_port
        assert port is not None, "gRPC is on"
        # gRPC only says that it could not bind, not why.
        await asyncio.get_running_loop().run_in_executor(None, _check_address, host, port)
        server = grpc.aio.server(
            interceptors=(self._edge,),
            options=self._options(),
            maximum_concurrent_rpcs=self._config.max_streams + SIDE_CALLS,
        )
        self._add_services(server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._config.tls is None:
                bound: int = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, public_server_credentials(self._config.tls))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address}: {error}; see gateway.grpc_port") from error
        await server.start()
        self._server = server
        return bound

    async def stop(self, grace_s: float) -> None:
        """Not serving, for health watchers, from now on; running calls end within the grace or are cancelled."""
        if self._server is None or self._health is None:
            return
        self._health.close()
        await self._server.stop(grace_s)

    def _add_services(self, server: grpc.aio.Server) -> None:
        own = [
            pb.DESCRIPTOR.services_by_name["Inference"].full_name,
            open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
        ]
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._health = Health(self._door.ready, frozenset({"", *own}), HEALTH_POLL_S)
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self._door), server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OpenInference(self._door, self._model), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer([*own, health, reflection.SERVICE_NAME]), server
        )

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", self._config.max_body_mib * 2**20),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", self._config.max_streams),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
        ]


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(address)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}; see gateway.grpc_port") from error
