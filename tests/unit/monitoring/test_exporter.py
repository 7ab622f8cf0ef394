"""Scrape targets over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from monitoring.exporter import PORTS, Exporter, ProcessRegistry, start_exporter


@pytest.fixture
def first_port() -> int:
    """With a few free ones behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return min(port, 65000)


@pytest.fixture
def exporters() -> Iterator[list[Exporter]]:
    made: list[Exporter] = []
    yield made
    for exporter in made:
        exporter.stop()


def text(exporter: Exporter) -> str:
    answer = httpx.get(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5)
    assert answer.status_code == 200
    return answer.text


def test_a_process_shows_its_own_memory_and_its_metrics(exporters: list[Exporter]) -> None:
    registry = ProcessRegistry()
    Counter("deepsplit_things", "Things.", registry=registry).inc(3)
    exporters.append(start_exporter(registry, "127.0.0.1", 0))
    shown = text(exporters[0])
    assert "deepsplit_things_total 3.0" in shown
    assert "process_resident_memory_bytes" in shown
    assert "_created" not in shown


def test_vllms_names_are_the_same_for_every_prometheus(exporters: list[Exporter]) -> None:
    library = CollectorRegistry()
    Counter("vllm:things", "Things.", registry=library).inc()
    exporters.append(start_exporter(ProcessRegistry(library), "127.0.0.1", 0))
    for wanted in ("application/openmetrics-text;version=1.0.0", "text/plain;version=0.0.4", "*/*"):
        answer = httpx.get(f"http://127.0.0.1:{exporters[0].port}/metrics", headers={"Accept": wanted}, timeout=5)
        assert "\nvllm:things_total 1.0" in answer.text, wanted


def test_gauges_are_brought_up_to_date_for_each_scrape(exporters: list[Exporter]) -> None:
    registry = ProcessRegistry()
    gauge = Gauge("deepsplit_depth", "Depth.", registry=registry)
    registry.before_scrape(lambda: gauge.inc())
    exporters.append(start_exporter(registry, "127.0.0.1", 0))
    assert "deepsplit_depth 1.0" in text(exporters[0])
    assert "deepsplit_depth 2.0" in text(exporters[0])


def test_a_librarys_metrics_come_along_once(exporters: list[Exporter]) -> None:
    library = CollectorRegistry()
    Counter("vllm_things", "Things.", registry=library).inc()
    registry = ProcessRegistry(library)
    exporters.append(start_exporter(registry, "127.0.0.1", 0))
    shown = text(exporters[0])
    assert "vllm_things_total 1.0" in shown
    assert "process_resident_memory_bytes" not in shown  # the library's to show


def test_processes_of_one_host_take_one_port_after_the_other(exporters: list[Exporter], first_port: int) -> None:
    exporters += [start_exporter(ProcessRegistry(), "127.0.0.1", first_port) for _ in range(3)]
    ports = [exporter.port for exporter in exporters]
    assert ports == sorted(set(ports))
    assert all(first_port <= port < first_port + PORTS for port in ports)


def test_a_port_is_free_again_after_stop(first_port: int) -> None:
    exporter = start_exporter(ProcessRegistry(), "127.0.0.1", 0)
    exporter.stop()
    again = start_exporter(ProcessRegistry(), "127.0.0.1", exporter.port)
    assert again.port == exporter.port
    again.stop()


def test_no_address_of_this_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        start_exporter(ProcessRegistry(), "203.0.113.1", 0)
