"""A gRPC client that knows nothing but the server's reflection, as grpcurl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class ReflectionClient:
    """List, describe, call."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> Sequence[str]:
        """Full names."""
        return list(self._database.get_services())

    def methods(self, service: str) -> Sequence[str]:
        """Names of a service's methods."""
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(
        self, service: str, method: str, request: Mapping[str, Any], timeout_s: float = 60
    ) -> list[dict[str, Any]]:
        """The answers to one call, one or several, as JSON. Raises grpc.RpcError."""
        described = self._pool.FindServiceByName(service).methods_by_name[method]
        asked, answered = GetMessageClass(described.input_type), GetMessageClass(described.output_type)
        multi = self._channel.unary_stream if described.server_streaming else self._channel.unary_unary
        send = multi(f"/{service}/{method}", asked.SerializeToString, answered.FromString)
        answer = send(ParseDict(request, asked()), timeout=timeout_s)
        answers = answer if described.server_streaming else [answer]
        return [MessageToDict(one, preserving_proto_field_name=True) for one in answers]
