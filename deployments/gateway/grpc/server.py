"""The gRPC server: deepsplit.v1, the Open Inference Protocol, health and reflection, all over one pipeline."""

from __future__ import annotations

import asyncio
import socket

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster.config import GatewayConfig
from cluster.errors import StartupError
from cluster.tls.grpc_credentials import public_server_credentials
from deployments.gateway.grpc import inference, oip
from deployments.gateway.grpc.health import Health
from deployments.gateway.grpc.interceptor import SIDE_CALLS, Interceptor
from deployments.gateway.models import ModelPages
from deployments.gateway.pipeline import Pipeline
from deployments.protos.deepsplit.v1 import inference_pb2, inference_pb2_grpc
from deployments.protos.inference import open_inference_pb2, open_inference_pb2_grpc

HEALTH_POLL_S = 0.5
_MAX_METADATA_BYTES = 16 * 1024
# A client whose host is gone is noticed within the two together; clients may ping as often as every 10 s.
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MIN_PING_MS = 10_000


class GrpcServer:
    """Serves a pipeline on gateway.host and gateway.grpc_port, on the running event loop."""

    def __init__(self, config: GatewayConfig, model: str, pipeline: Pipeline, models: ModelPages) -> None:
        self._config = config
        self._model = model
        self._pipeline = pipeline
        self._models = models
        paths = inference.PATHS | oip.PATHS
        self._interceptor = Interceptor(pipeline, paths, oip.SESSIONS, config.write_stall_s)
        self._health: Health | None = None
        self._server: grpc.aio.Server | None = None
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port. Gateways on one node share it. Raises StartupError."""
        host, port = self._config.host, self._config.grpc_port
        assert port is not None, "gRPC is on"
        # gRPC only says that it could not bind, not why.
        await asyncio.get_running_loop().run_in_executor(None, _check_address, host, port)
        server = grpc.aio.server(
            interceptors=(self._interceptor,),
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

    def drain(self, grace_s: float) -> None:
        """Tell clients to go elsewhere: no new connection, no new call; running ones may end within the grace."""
        if self._server is not None and self._health is not None:
            self._health.close()
            self._draining = asyncio.create_task(self._server.stop(grace_s))

    async def stop(self, grace_s: float) -> None:
        """Not serving, for health watchers, from now on; running calls end within the grace or are cancelled."""
        if self._server is None or self._health is None:
            return
        self._health.close()
        await self._server.stop(grace_s)

    def _add_services(self, server: grpc.aio.Server) -> None:
        own = [
            inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
            open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
        ]
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._health = Health(self._pipeline.ready, frozenset({"", *own}), HEALTH_POLL_S)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference.Inference(self._models), server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            oip.OpenInference(self._pipeline, self._model), server
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
