"""Where a process's metrics are to be found, and what every process says of itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from cluster.config import Config
from cluster.errors import StartupError
from deployments.hosting.scrape import ProcessScrape, read_scrape_file, scrape_process, write_scrape_file
from monitoring.discovery import ScrapeTarget
from monitoring.exporter import ProcessRegistry
from tests.certificates import Authority

NODE = "192.0.2.7"


@pytest.fixture
def scrapes() -> Iterator[list[ProcessScrape]]:
    made: list[ProcessScrape] = []
    yield made
    for scrape in made:
        scrape.stop()


def config(tmp_path: Path, **sections: object) -> Config:
    return Config.model_validate({"model": {"path": tmp_path}, "monitoring": {"port": 0}, **sections})


def test_a_cluster_of_our_own_is_scraped_on_loopback(tmp_path: Path, scrapes: list[ProcessScrape]) -> None:
    scrapes.append(scrape_process(ProcessRegistry(), "experts", "experts-1", NODE, config(tmp_path)))
    target = scrapes[0].target
    assert target == ScrapeTarget("experts", target.address, NODE, "experts-1")
    assert target.address.startswith("127.0.0.1:")
    shown = httpx.get(f"http://{target.address}/metrics", timeout=5).text
    assert re.search(r'deepsplit_process_info\{version="[\d.]+"\} 1\.0', shown)


def test_every_address_is_told_as_the_nodes_own(tmp_path: Path, scrapes: list[ProcessScrape]) -> None:
    wide = config(tmp_path, monitoring={"port": 0, "host": "0.0.0.0"})
    scrapes.append(scrape_process(ProcessRegistry(), "directory", "", NODE, wide))
    assert scrapes[0].target.address.startswith(f"{NODE}:")


def test_a_joined_cluster_is_scraped_at_the_nodes_address(tmp_path: Path) -> None:
    joined = config(tmp_path, ray={"address": "auto"})
    with pytest.raises(StartupError, match=re.escape(f"no port for metrics on {NODE}")) as raised:
        scrape_process(ProcessRegistry(), "experts", "", NODE, joined)  # no address of this machine
    assert "monitoring.host and monitoring.port" in str(raised.value)


def test_when_certificates_end_and_that_they_were_renewed(tmp_path: Path, scrapes: list[ProcessScrape]) -> None:
    authority = Authority("ours")
    tls = authority.issue(tmp_path / "tls")
    secure = config(tmp_path, internal_tls=tls.model_dump())
    registry = ProcessRegistry()
    scrapes.append(scrape_process(registry, "experts", "", NODE, secure))

    def ends_s() -> float:
        shown = httpx.get(f"http://{scrapes[0].target.address}/metrics", timeout=5).text
        found = re.search(r'certificate="internal_tls"\} (\S+)', shown)
        assert found is not None
        return float(found[1])

    day_s = 24 * 3600
    assert ends_s() == pytest.approx(time.time() + day_s, abs=60)
    tls.cert_file.write_bytes(b"half a certif")
    assert ends_s() == pytest.approx(time.time() + day_s, abs=60)
    authority.issue(tmp_path / "tls", ends=timedelta(days=30))
    assert ends_s() == pytest.approx(time.time() + 30 * day_s, abs=60)


def test_the_engine_tells_its_replica_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "scrape"
    assert read_scrape_file(file) is None
    target = ScrapeTarget("engine", "127.0.0.1:9405", NODE, "replica-1")
    write_scrape_file(file, target)
    assert read_scrape_file(file) == target
    assert [path.name for path in tmp_path.iterdir()] == ["scrape"]
