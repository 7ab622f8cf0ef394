"""The section `gateway`."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cluster.config.section import NodeSelector, Section, conflict
from cluster.config.tls import ServerTls

# An Origin header is compared as text: a default port or a slash in the list would match no browser.
_ORIGIN = re.compile(r"(?!http://[^/]*:80$)(?!https://[^/]*:443$)[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")


class GatewayConfig(Section):
    """What clients talk to: REST and gRPC, with keys, bounds and TLS."""

    host: str = Field("127.0.0.1", description="Address that REST and gRPC listen on.")
    port: int = Field(8000, ge=1, le=65535, description="REST port.")
    grpc_port: int | None = Field(9000, ge=1, le=65535, description="gRPC port; null turns gRPC off.")
    replicas: int = Field(1, ge=1, description="Number of gateway replicas; those on one node share its ports.")
    placement: NodeSelector = Field(default_factory=NodeSelector, description="Which nodes gateway replicas run on; "
                                                                              "Ray's head node if not set.")
    tls: ServerTls | None = Field(None, description="Serve REST and gRPC over TLS.")
    keys_file: Path | None = Field(None, description="Tenants and the hashes of their API keys (docs/operations.md); "
                                                     "read again when it changes. Without it there are no keys.")
    allow_anonymous: bool = Field(False, description="Listen beyond loopback without API keys.")
    max_body_mib: int = Field(8, ge=1, description="Largest request body, in MiB.")
    max_bodies_mib: int = Field(512, ge=1, description="Most memory of request bodies that one gateway replica holds "
                                                       "at once, in MiB; requests beyond it are refused as overload.")
    max_sequences: int = Field(256, ge=1, description="Most sequences of one request: `n` times its prompts.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longest prompt, in tokens; the engine's own bound "
                                                                  "if not set.")
    max_streams: int = Field(1024, ge=1, description="Most requests in flight per gateway replica, waiting ones "
                                                     "included.")
    request_timeout_s: float = Field(600.0, gt=0, description="Longest life of one request.")
    idle_timeout_s: float = Field(150.0, gt=0, description="How long an HTTP connection stays open between requests.")
    first_request_timeout_s: float = Field(60.0, gt=0, description="How long an HTTP connection may stay without a "
                                                                   "first request.")
    write_stall_s: float = Field(30.0, gt=0, description="How long a client may read nothing of its answer before it "
                                                         "is given up; on gRPC, for each 64 KiB of a message.")
    stream_idle_timeout_s: float = Field(300.0, gt=0, description="How long an Open Inference Protocol "
                                                                  "`ModelStreamInfer` call may stay open while nothing "
                                                                  "is asked or answered on it.")
    connection_max_age_s: float = Field(3600.0, gt=0, description="Age at which a gRPC connection is ended gracefully: "
                                                                  "calls on it finish, and a load balancer places the "
                                                                  "next one anew.")
    sse_comment_interval_s: float | None = Field(
        15.0, gt=0, description="How often a stream that waits or prefills sends a comment, which keeps proxies from "
                                "closing it; null turns comments off.")
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins of browser pages that may call the REST API, such as [https://chat.example.com]; "
                        "[\"*\"] for all. None by default.")
    drain_timeout_s: float = Field(30.0, ge=0, description="How long a stopping gateway lets running requests end "
                                                           "before it ends them with an error.")
    replica_timeout_s: float = Field(5.0, gt=0, description="Silence after which an attention replica is taken as lost "
                                                            "(hung, or cut off).")
    max_resends: int = Field(2, ge=0, description="How often one request may be sent to another attention replica "
                                                  "after the one that had it was lost.")

    @model_validator(mode="after")
    def _is_not_open_to_the_world(self) -> Self:
        if not (self.keys_file or self.allow_anonymous or _is_loopback(self.host)):
            raise conflict("host", f"{self.host} can be reached from other machines, but there are no API keys: set "
                                    "gateway.keys_file (`deepsplit key new` makes a key), or "
                                    "gateway.allow_anonymous: true if everybody may use it")
        if self.grpc_port == self.port:
            raise conflict("grpc_port", f"is gateway.port ({self.port}) too; each needs a port of its own")
        return self

    @model_validator(mode="after")
    def _holds_the_largest_body(self) -> Self:
        if self.max_bodies_mib < self.max_body_mib:
            raise conflict("max_bodies_mib", f"{self.max_bodies_mib} is below gateway.max_body_mib "
                                              f"({self.max_body_mib}), so the largest body would never be read: raise "
                                              "it, or lower gateway.max_body_mib")
        return self

    @model_validator(mode="after")
    def _origins_are_as_browsers_send_them(self) -> Self:
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise conflict("cors_origins", '"*" allows every origin: leave the others out, or "*"')
        for index, origin in enumerate(self.cors_origins):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise conflict(("cors_origins", index), f"{origin!r} is not an origin as browsers send it: write "
                                                         "scheme://host or scheme://host:port, in lower case, without "
                                                         "a path, a slash at the end, or the scheme's default port")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
