"""A process's scrape target: serves its metrics over HTTP on a thread of its own."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, disable_created_metrics, start_http_server

PORTS = 64  # most scrape targets of one host


class ProcessRegistry(CollectorRegistry):
    """The metrics of one process, with its memory, CPU time and file descriptors."""

    def __init__(self, library: CollectorRegistry | None = None) -> None:
        """`library`: the registry of a library in this process, whose metrics come along; it must include memory and
        CPU time of the process.
        """
        super().__init__()
        disable_created_metrics()  # a second series for each counter and histogram
        self._refreshers: list[Callable[[], None]] = []
        if library is None:
            ProcessCollector(registry=self)
        else:
            self.register(library)

    def before_scrape(self, refresh: Callable[[], None]) -> None:
        """Have `refresh` bring metrics up to date whenever somebody scrapes, on the scraping thread."""
        self._refreshers.append(refresh)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, brought up to date."""
        for refresh in self._refreshers:
            refresh()
        yield from super().collect()


@dataclass(frozen=True)
class Exporter:
    """A listening scrape target."""

    port: int
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
        _speak_plain_text(server)
        return Exporter(server.server_port, server, thread)
    raise OSError(errno.EADDRINUSE, f"all ports from {ports[0]} to {ports[-1]} are in use")


def _speak_plain_text(server: WSGIServer) -> None:
    """Answer in plain text whatever is asked for: in OpenMetrics prometheus-client 0.26 writes vLLM's `vllm:name` as
    `vllm_name`.
    """
    negotiating = server.get_app()
    assert negotiating is not None
    server.set_app(lambda environ, start: negotiating({**environ, "HTTP_ACCEPT": "text/plain"}, start))
