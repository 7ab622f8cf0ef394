"""Which parsers read a model's text, by its type and what its chat template does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config.vllm_arguments import REASONING_PARSERS, TOOL_PARSERS
from cluster.errors import CheckpointError
from cluster.model.dialect import chat_template, dialect_of, load_dialect

# What tells the releases' templates apart; the whole templates are the releases'.
V3_0324 = "{{'tool▁calls▁begin' + 'tool▁call▁begin' + tool['type']}}"
R1 = V3_0324 + "{% if '</think>' in content %}{% endif %}{{'<think>\\n'}}"
V31 = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + V3_0324 + "{{'<think>'}}{{'</think>'}}"
QWEN = "{% for tool in tools %}<tool_call>{% endfor %}"


@pytest.mark.parametrize(("model_type", "template", "said"), [
    ("deepseek_v3", V3_0324, "DeepSeek-V3: tools by deepseek_v3, no reasoning"),
    ("deepseek_v3", R1, "DeepSeek-R1: tools by deepseek_v3, reasoning by deepseek_r1"),
    ("deepseek_v3", V31, "DeepSeek-V3.1: tools by deepseek_v31, reasoning by deepseek_v3, switched by thinking"),
    ("deepseek_v32", "", "DeepSeek-V3.2: tools by deepseek_v32, reasoning by deepseek_v3, switched by thinking"),
    ("kimi_k2", "tool", "Kimi-K2: tools by kimi_k2, no reasoning"),
    ("kimi_k2", "tool <think>", "Kimi-K2: tools by kimi_k2, reasoning by kimi_k2"),
    ("glm4_moe", "<think>", "GLM-4.5: tools by glm45, reasoning by glm45, switched by enable_thinking"),
    ("minimax_m2", "", "MiniMax-M2: tools by minimax_m2, reasoning by minimax_m2"),
    ("qwen3_moe", QWEN, "Qwen3: tools by hermes, no reasoning"),
    ("qwen3_moe", QWEN + "<function=", "Qwen3: tools by qwen3_coder, no reasoning"),
    ("qwen3_moe", QWEN + "<think>", "Qwen3: tools by hermes, reasoning by qwen3"),
    ("qwen3_moe", QWEN + "{% if enable_thinking %}<think>",
     "Qwen3: tools by hermes, reasoning by qwen3, switched by enable_thinking"),
])  # fmt: skip
def test_releases(model_type: str, template: str, said: str) -> None:
    found = dialect_of(model_type, template)
    assert found is not None
    assert str(found) == said
    assert found.tool_parser in ("", *TOOL_PARSERS)
    assert found.reasoning_parser in ("", *REASONING_PARSERS)


@pytest.mark.parametrize(("model_type", "template"), [("deepseek_v3", ""), ("mixtral", QWEN), ("qwen3_moe", "plain")])
def test_unknown_ones_have_none(model_type: str, template: str) -> None:
    assert dialect_of(model_type, template) is None


def test_the_demo_model_speaks_none(demo_model: Path) -> None:
    assert load_dialect(demo_model) is None


def test_templates_lie_in_a_file_or_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    assert chat_template(tmp_path) == ""
    several = [{"name": "rag", "template": "other"}, {"name": "default", "template": "this"}]
    for content, found in (("inline", "inline"), (several, "this"), ([], ""), (None, "")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": content}))
        assert chat_template(tmp_path) == found
    (tmp_path / "chat_template.jinja").write_text("own")
    assert chat_template(tmp_path) == "own"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        chat_template(tmp_path)
