"""The gRPC server: deepsplit.v1, the Open Inference Protocol, health and reflection, all over one pipeline."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster.addresses import bracketed
from cluster.config import GatewayConfig
from cluster.errors import StartupError
from cluster.tls.grpc_credentials import public_server_credentials
from deployments.gateway.body import READ_TIMEOUT_S
from deployments.gateway.grpc import inference, oip
from deployments.gateway.grpc.health import Health
from deployments.gateway.grpc.interceptor import SIDE_CALLS, Interceptor
from deployments.gateway.models import ModelPages
from deployments.gateway.pipeline import Pipeline
from deployments.hosting.listeners import listen
from deployments.protos.deepsplit.v1 import inference_pb2, inference_pb2_grpc
from deployments.protos.inference import open_inference_pb2, open_inference_pb2_grpc

HEALTH_POLL_S = 0.5
_MAX_METADATA_BYTES = 16 * 1024
# A client whose host is gone is noticed within the two together; clients may ping as often as every 10 s.
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MIN_PING_MS = 10_000
_MAX_MS = 2**31 - 1  # the largest that gRPC takes


class GrpcServer:
    """Serves a pipeline on gateway.host and gateway.grpc_port, on the running event loop."""

    def __init__(
        self, config: GatewayConfig, pipeline: Pipeline, models: ModelPages, read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._models = models
        self._interceptor = Interceptor(pipeline, config, read_timeout_s)
        self._health: Health | None = None
        self._server: grpc.aio.Server | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port. Gateways on one node share it. Raises StartupError."""
        host, port = self._config.host, self._config.grpc_port
        assert port is not None, "gRPC is on"
        # `maximum_concurrent_rpcs` is not used: there, calls whose client reads nothing count for as long as their
        # connection lives, and would keep everybody out. The interceptor and the pipeline bound calls themselves.
        server = grpc.aio.server(interceptors=(self._interceptor,), options=self._options())
        self._add_services(server)
        # gRPC only says that it could not bind, not why: so every address is bound here first.
        loop = asyncio.get_running_loop()
        bound = await loop.run_in_executor(None, listen, host, port, "gateway.grpc_port", True)
        with ExitStack() as stack:
            for one in bound:
                address, port, *_ = stack.enter_context(one).getsockname()
                self._add_port(server, f"{bracketed(address)}:{port}")
        await server.start()
        self._server = server
        return port

    async def drain(self) -> None:
        """Send clients elsewhere: no new connection, no new call; running ones go on. Health watchers hear it first."""
        if self._server is None or self._health is None or self._stopping is not None:
            return
        await self._health.close()
        # Nobody waits for the end yet; `stop` sets a nearer one.
        self._stopping = asyncio.create_task(self._server.stop(self._config.request_timeout_s))

    async def stop(self, grace_s: float) -> None:
        """Drain; running calls end within the grace or are cancelled."""
        await self.drain()
        if self._server is not None and self._stopping is not None:
            await self._server.stop(grace_s)
            await self._stopping

    def _add_port(self, server: grpc.aio.Server, address: str) -> None:
        try:
            if self._config.tls is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, public_server_credentials(self._config.tls))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address}: {error}; see gateway.grpc_port") from error

    def _add_services(self, server: grpc.aio.Server) -> None:
        own = [
            inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
            open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
        ]
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._health = Health(self._pipeline.ready, frozenset({"", *own}), HEALTH_POLL_S)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference.Inference(self._models), server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(oip.OpenInference(self._pipeline), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer([*own, health, reflection.SERVICE_NAME]), server
        )

    def _options(self) -> list[tuple[str, int]]:
        config = self._config
        # Calls that run when a connection is old may end: requests, and sessions, which are as old at most.
        grace_s = config.connection_max_age_s + config.stream_idle_timeout_s + config.request_timeout_s
        return [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", config.max_body_mib * 2**20),
            ("grpc.max_send_message_length", -1),
            # Otherwise gRPC takes up to 4 MiB of every call that nobody has asked for.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
            # A proxy may bring everything over one connection.
            ("grpc.max_concurrent_streams", config.max_streams + SIDE_CALLS),
            ("grpc.max_connection_age_ms", _milliseconds(config.connection_max_age_s)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(grace_s)),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
        ]


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), _MAX_MS)
