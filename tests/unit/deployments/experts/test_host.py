"""What stops an expert worker before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cluster.config import Config, ModelConfig
from cluster.errors import StartupError
from deployments.experts.host import ExpertHost
from monitoring.expert_meter import ExpertMeter
from monitoring.metrics import ExpertMetrics
from tests.certificates import DAY, Authority


def test_unusable_certificates_are_found_before_the_load(tmp_path: Path) -> None:
    tls = Authority("ours").issue(tmp_path, ends=-DAY)
    config = Config(model=ModelConfig(path=tmp_path / "no-model-here"), internal_tls=tls)
    with pytest.raises(StartupError, match=r"internal_tls\.cert_file \S+ expired"):
        ExpertHost(config, {}, ExpertMeter(ExpertMetrics(CollectorRegistry())))
