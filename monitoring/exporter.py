"""A process's scrape target: its registry over HTTP, on a thread of its own."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

PORTS = 64  # most scrape targets of one host


class BeforeScrape(Collector):
    """Has `refresh` bring gauges up to date whenever somebody scrapes. Register it before what it refreshes."""

    def __init__(self, refresh: Callable[[], None]) -> None:
        self._refresh = refresh

    def describe(self) -> Iterable[Metric]:
        """Nothing of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        self._refresh()
        return ()


def process_registry() -> CollectorRegistry:
    """A registry with the process's own memory, CPU time and file descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@dataclass(frozen=True)
class Exporter:
    """A listening scrape target."""

    address: str  # host:port
    _server: WSGIServer
    _thread: Thread

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_exporter(registry: CollectorRegistry, host: str, first_port: int) -> Exporter:
    """Listen on the first free port of PORTS from `first_port` on; 0: on any free one.

    Raises OSError when none is free or `host` is not an address of this machine.
    """
    ports = range(first_port, min(first_port + PORTS, 65536)) if first_port else range(1)
    for port in ports:
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        shown = f"[{host}]" if ":" in host else host
        return Exporter(f"{shown}:{server.server_port}", server, thread)
    raise OSError(errno.EADDRINUSE, f"all ports from {ports[0]} to {ports[-1]} are in use")
