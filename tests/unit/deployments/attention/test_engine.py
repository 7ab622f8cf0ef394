"""What vLLM is given: arguments by name, nested settings as its own classes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Config
from deployments.attention.engine import parse_args
from deployments.attention.vllm_internals import CompilationConfig


def parsed(**args: Any) -> tuple[Any, Any]:
    model = {"path": "/models/demo", "name": "demo", "aliases": ["one", "two"]}
    return parse_args(Config.model_validate({"model": model}), args)


def test_the_model_and_all_its_names() -> None:
    engine, _ = parsed()
    assert (engine.model, engine.served_model_name) == ("/models/demo", ["demo", "one", "two"])


def test_each_argument_goes_where_vllm_has_it() -> None:
    engine, frontend = parsed(seed=3, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3")
    assert (engine.seed, engine.reasoning_parser) == (3, "qwen3")
    assert (frontend.enable_auto_tool_choice, frontend.tool_call_parser) == (True, "hermes")


def test_mappings_become_vllms_settings() -> None:
    engine, _ = parsed(
        compilation_config={"custom_ops": ["all"]},
        structured_outputs_config={"backend": "xgrammar"},
        kv_events_config={"enable_kv_cache_events": True},
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        additional_config={"deepsplit": {"node": "a"}},
    )
    assert isinstance(engine.compilation_config, CompilationConfig)
    assert engine.structured_outputs_config.backend == "xgrammar"
    assert engine.kv_events_config.enable_kv_cache_events
    assert engine.speculative_config == {"method": "mtp", "num_speculative_tokens": 1}  # a mapping to vLLM as well
    assert engine.additional_config == {"deepsplit": {"node": "a"}}


def test_what_vllm_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        parsed(no_such_argument=1)
    with pytest.raises(ValidationError, match="no_such_setting"):
        parsed(kv_events_config={"no_such_setting": 1})
