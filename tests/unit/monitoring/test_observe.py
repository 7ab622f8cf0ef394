"""`make observe` without a cluster: a real Prometheus on a fake of service discovery, and every error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from monitoring.alerts.__main__ import all_groups
from monitoring.links import BOARDS
from monitoring.local_prometheus import RULES, Discovery, ObserveError, choose_port, prometheus_config
from tests.cli import free_port, wait_until
from tests.unit.monitoring.test_alerts import promtool

pytestmark = pytest.mark.usefixtures("no_leftovers")

KEY = "sk-operator"
MONITORING = RULES.parents[1]


class _Gateway(BaseHTTPRequestHandler):
    """Service discovery with a key, and a scrape target: itself."""

    def do_GET(self) -> None:
        status, body = 200, b"deepsplit_uncovered_experts 0\n"
        if self.path == "/sd/prometheus":
            status = 200 if self.headers.get("Authorization") == f"Bearer {KEY}" else 401
            host = f"127.0.0.1:{self.server.server_address[1]}"
            body = json.dumps([{"targets": [host], "labels": {"role": "directory", "model": "m"}}]).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if self.path == "/sd/prometheus" else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def gateway() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    return file


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "monitoring.observe", *arguments], env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def error_of(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    process = start(*arguments, environment=environment)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert error.startswith("error: ")
    return error


def test_prometheus_accepts_the_configuration(tmp_path: Path, key_file: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    text = prometheus_config(Discovery("https://host:8000/sd/prometheus", key_file, authority))
    file = tmp_path / "prometheus.yml"
    file.write_text(text)
    promtool("check", "config", "--syntax-only", file)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    (found,) = job["http_sd_configs"]
    assert found["authorization"]["credentials_file"] == str(key_file)
    assert found["tls_config"]["ca_file"] == str(authority)
    assert found["refresh_interval"] == "5s"
    assert KEY not in text


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_scrapes_what_is_discovered_and_cleans_up(gateway: str, key_file: Path, stop: signal.Signals) -> None:
    port = free_port()
    process = start("--gateway", gateway, "--key-file", str(key_file), "--port", str(port))
    try:
        assert process.stdout is not None
        shown = [process.stdout.readline() for _ in range(5)]
        assert shown[0].startswith(f"Prometheus  http://127.0.0.1:{port} ")
        assert "dashboards/*.json" in shown[1]

        def scraped() -> bool:
            query = {"query": 'deepsplit_uncovered_experts{job="deepsplit",role="directory",model="m"}'}
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query).json()
            return [series["value"][1] for series in answer["data"]["result"]] == ["0"]

        wait_until("a scrape", scraped, 30)
        groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert {group["name"] for group in groups} == {group.name for group in all_groups()}
    finally:
        process.send_signal(stop)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/-/ready")


def test_an_end_of_prometheus_is_told(gateway: str, key_file: Path) -> None:
    process = start("--gateway", gateway, "--key-file", str(key_file), "--port", str(free_port()))
    assert process.stdout is not None
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error.splitlines()[0]) == (1, "error: prometheus ended by itself:")


def test_without_a_key(gateway: str) -> None:
    assert "--key-file FILE" in error_of("--gateway", gateway)


def test_without_its_key_file(gateway: str, tmp_path: Path) -> None:
    assert f"{tmp_path}/none: No such file" in error_of("--gateway", gateway, "--key-file", f"{tmp_path}/none")


def test_without_a_gateway() -> None:
    assert "is the gateway up?" in error_of("--gateway", f"http://127.0.0.1:{free_port()}")


def test_without_a_cluster(tmp_path: Path) -> None:
    error = error_of(environment={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert "no cluster is running: start one with `deepsplit up`" in error


def test_without_prometheus(gateway: str, key_file: Path, tmp_path: Path) -> None:
    error = error_of("--gateway", gateway, "--key-file", str(key_file), environment={"PATH": str(tmp_path)})
    assert "apt-get install prometheus" in error


def test_on_a_port_that_is_taken(gateway: str, key_file: Path) -> None:
    taken = gateway.rsplit(":", 1)[1]
    assert f"port {taken} is taken" in error_of("--gateway", gateway, "--key-file", str(key_file), "--port", taken)


def test_another_port_if_the_usual_one_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        usual = other.getsockname()[1]
        assert choose_port(None, usual) not in (0, usual)
        with pytest.raises(ObserveError, match="is taken"):
            choose_port(usual, usual)
    free = free_port()
    assert choose_port(None, free) == free


def test_grafanas_provisioning() -> None:
    (source,) = yaml.safe_load((MONITORING / "grafana/datasources/deepsplit.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "$PROMETHEUS_URL")
    (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards/deepsplit.yaml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "$DEEPSPLIT_DASHBOARDS")
    assert {file.stem for file in (MONITORING / "dashboards").iterdir()} == set(BOARDS)
