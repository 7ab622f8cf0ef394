"""The plugin refuses to start with the fix named, and is what vLLM builds in place of its own class."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import vllm
from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import StartupError
from deployments.attention import plugin
from deployments.attention.loader import AttentionOnlyLoader
from deployments.attention.plugin import check_installed
from deployments.attention.remote_experts import RemoteRoutedExperts
from deployments.attention.settings import RemoteExpertsSettings, current_settings


def test_an_untested_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(StartupError, match=r"vLLM 0\.31\.0 was not tested.*install vllm==0\.32\.0"):
        check_installed()


def test_a_missing_entry_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = importlib.metadata.EntryPoints(())
    monkeypatch.setattr(plugin, "entry_points", lambda group: nothing)
    with pytest.raises(StartupError, match="pip install -e"):
        check_installed()


def test_a_plugin_list_without_us_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(StartupError, match=r"VLLM_PLUGINS=other.*add 'deepsplit'"):
        check_installed()


def test_an_installed_plugin_passes() -> None:
    check_installed()


def test_registration_takes_the_place_of_vllms_class_and_may_repeat() -> None:
    plugin.register()
    plugin.register()
    assert op_registry_oot[RoutedExperts.__name__] is RemoteRoutedExperts
    assert _LOAD_FORMAT_TO_MODEL_LOADER[plugin.LOAD_FORMAT] is AttentionOnlyLoader


def test_settings_survive_additional_config(tmp_path: Path) -> None:
    tls = InternalTlsConfig(cert_file=tmp_path / "c", key_file=tmp_path / "k", ca_file=tmp_path / "a")
    sent = RemoteExpertsSettings(
        placement_file=tmp_path / "p.json", model_path=tmp_path, dispatch=DispatchConfig(), internal_tls=tls
    )
    config = VllmConfig(additional_config=sent.as_additional_config(), cache_config=CacheConfig())
    with set_current_vllm_config(config):
        assert current_settings() == sent
    with set_current_vllm_config(VllmConfig(cache_config=CacheConfig())):
        assert current_settings() is None
