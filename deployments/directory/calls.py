"""How other processes call the directory."""

from __future__ import annotations

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

# What a call raises while the directory is away, being restarted, or out of reach.
DIRECTORY_AWAY = (RayError, RayServeException, grpc.RpcError, TimeoutError)


def over_grpc(directory: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls go to the directory's process over Serve's own gRPC (Ray's token guards it too).

    Through actor calls, which are Serve's default, one caller that is stopped (SIGSTOP, a frozen host) while it waits
    for its answer holds up the answers to all others: a replica reports results to callers one after the other.
    """
    return directory.options(_by_reference=False)
