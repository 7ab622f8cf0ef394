"""The whole product with `internal_tls`: inner ports refuse strangers, and certificates can be replaced."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import WorkerLost
from routing.tokens.link import WorkerLink
from routing.tokens.wire import DispatchRequest, encode_request
from tests.certificates import Authority, MountedSecret
from tests.cli import Cli, complete, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPT = "def read_lines(path):\n"
OLD, NEW = Authority("old"), Authority("new")


def files(pair_of: Authority, *believed: Authority) -> dict[str, bytes]:
    cert_pem, key_pem = pair_of.pair()
    return {"tls.crt": cert_pem, "tls.key": key_pem, "ca.crt": b"".join(authority.pem for authority in believed)}


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> MountedSecret:
    made = MountedSecret(tmp_path_factory.mktemp("secret"))
    made.replace(files(OLD, OLD))
    return made


@pytest.fixture(scope="module")
def cli(
    no_leftovers: None, demo_model: Path, secret: MountedSecret, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cli]:
    tls = InternalTlsConfig(
        cert_file=secret.folder / "tls.crt", key_file=secret.folder / "tls.key", ca_file=secret.folder / "ca.crt"
    )
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as short:
        made = Cli(tmp_path_factory.mktemp("user"), Path(short))
        config: dict[str, Any] = {
            "model": {"path": str(demo_model), "name": "demo", "dtype": "float32"},
            "attention": {"kv_cache_gib": 0.25, "max_model_len": 1024},
            "experts": {"workers": 2},
            "gateway": {"port": free_port(), "grpc_port": free_port(), "replicas": 2},
            "internal_tls": tls.model_dump(mode="json"),
        }
        made.up(made.write_config(config))
        yield made
        made.down()


def workers(cli: Cli) -> dict[int, str]:
    """pid -> address of those that are ready."""
    return {worker["pid"]: worker["address"] for worker in cli.status()["experts"] if worker["state"] == "ready"}


def all_decide_in_common(url: str) -> bool:
    """Whether every gateway does that one of ten new connections reaches."""
    answers = [httpx.get(f"{url}/v1/deepsplit/status", timeout=30) for _ in range(10)]
    return all(one.status_code == 200 and one.json()["gateway"]["common_admission"] is True for one in answers)


def process_of(cli: Cli, deployment: str) -> psutil.Process:
    driver = psutil.Process(cli.status()["supervisor"]["pid"])
    title = f"ServeReplica:deepsplit:{deployment}"
    found = []
    for one in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(one.cmdline()):
                found.append(one)
    (process,) = found
    return process


def test_plain_clients_reach_no_expert(cli: Cli) -> None:
    for address in workers(cli).values():
        link = WorkerLink(address, "any-model", DispatchConfig())
        ids_TK = torch.zeros(1, 1, dtype=torch.int16)
        request = DispatchRequest(1, 1, 1, 5000, torch.ones(1, 8), ids_TK, torch.ones(1, 1), torch.float32)
        link.send(encode_request(request))
        with pytest.raises(WorkerLost, match="internal_tls must be set here too"):
            link.receive(1, 10)
        link.close()


def test_gateways_decide_in_common(cli: Cli) -> None:
    url = cli.status()["gateway"]["rest"]
    wait_until("both gateways at the common admission", lambda: all_decide_in_common(url), 30)


def test_certificates_of_another_authority_take_over_while_it_serves(cli: Cli, secret: MountedSecret) -> None:
    url = cli.status()["gateway"]["rest"]
    expected = complete(url, "demo", PROMPT, 24)
    for step in (files(OLD, OLD, NEW), files(NEW, OLD, NEW), files(NEW, NEW)):
        secret.replace(step)
        before = workers(cli)
        psutil.Process(min(before)).kill()  # so that new connections are made
        assert complete(url, "demo", PROMPT, 24) == expected
        wait_until("a new worker", lambda before=before: len(workers(cli)) == 2 and workers(cli) != before, 60)
        assert complete(url, "demo", PROMPT, 24) == expected
    process_of(cli, "admission").kill()
    assert complete(url, "demo", PROMPT, 24) == expected
    wait_until("both gateways at the new common admission", lambda: all_decide_in_common(url), 60)
    assert complete(url, "demo", PROMPT, 24) == expected
