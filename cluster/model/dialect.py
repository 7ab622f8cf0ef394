"""How a model writes tool calls and reasoning: which of vLLM's parsers read it. Told from config.json and the
checkpoint's chat template; no tokenizer is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CheckpointError


@dataclass(frozen=True)
class Dialect:
    """Names are those of vLLM's parsers; empty: the model does not do that."""

    name: str  # as people call it
    tool_parser: str
    reasoning_parser: str
    switch: str = ""  # the template's variable that turns reasoning on or off; empty: there is none

    def __str__(self) -> str:
        """In words, for operators."""
        tools = f"tools by {self.tool_parser}" if self.tool_parser else "no tools"
        reasoning = f"reasoning by {self.reasoning_parser}" if self.reasoning_parser else "no reasoning"
        return f"{self.name}: {tools}, {reasoning}" + (f", switched by {self.switch}" if self.switch else "")


_V32 = Dialect("DeepSeek-V3.2", "deepseek_v32", "deepseek_v3", "thinking")
_V31 = Dialect("DeepSeek-V3.1", "deepseek_v31", "deepseek_v3", "thinking")
_R1 = Dialect("DeepSeek-R1", "deepseek_v3", "deepseek_r1")
_V3 = Dialect("DeepSeek-V3", "deepseek_v3", "")


def load_dialect(checkpoint: Path) -> Dialect | None:
    """Return the dialect of a checkpoint, None for one that is not known. Raises CheckpointError for files that cannot
    be read.
    """
    return dialect_of(str(_json(checkpoint / "config.json").get("model_type", "")), chat_template(checkpoint))


def dialect_of(model_type: str, template: str) -> Dialect | None:
    """Return the dialect of a model with this `model_type` (config.json) and chat template (empty: none)."""
    tools, thinks = "tool" in template, "<think>" in template
    if model_type == "deepseek_v32":
        return _V32  # its template is code, which vLLM has
    if model_type in ("deepseek_v2", "deepseek_v3"):
        if not thinks:
            return _V3 if "tool▁call" in template else None
        return _V31 if "thinking" in template.replace("<think>", "").replace("</think>", "") else _R1
    if model_type == "kimi_k2":
        return Dialect("Kimi-K2", "kimi_k2", "kimi_k2" if thinks else "")
    if model_type == "glm4_moe":
        return Dialect("GLM-4.5", "glm45", "glm45" if thinks else "", "enable_thinking" if thinks else "")
    if model_type == "minimax_m2":
        return Dialect("MiniMax-M2", "minimax_m2", "minimax_m2")
    if model_type in ("qwen3_moe", "qwen3_next") and (tools or thinks):
        parser = "qwen3_coder" if "<function=" in template else "hermes" if "<tool_call>" in template else ""
        switch = "enable_thinking" if "enable_thinking" in template else ""
        return Dialect("Qwen3", parser, "qwen3" if thinks else "", switch)
    return None


def chat_template(checkpoint: Path) -> str:
    """Return a checkpoint's chat template: of its own file, or of its tokenizer's configuration; empty if it has none.
    Raises CheckpointError.
    """
    own, tokenizer = checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json"
    try:
        if own.exists():
            return own.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{own} cannot be read ({error}): download it again") from None
    found = _json(tokenizer).get("chat_template", "") if tokenizer.exists() else ""
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default") or next(iter(named.values()), "")
    return found if isinstance(found, str) else ""


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object: download it again")
    return content
