"""The engine's words about settings, as vLLM has them, and as our users read them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.engine_args import REFUSED
from cluster.config.vllm_arguments import EngineArguments
from deployments.gateway.upstream.engine_messages import PHRASES, in_our_words


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}).encode()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            '"auto" tool choice requires attention.engine_args.enable_auto_tool_choice and '
            "attention.engine_args.tool_call_parser to be set",
        ),
        (
            'tool_choice=function "f" requires --tool-call-parser to be set',
            'tool_choice=function "f" requires attention.engine_args.tool_call_parser to be set',
        ),
        (
            "Please set --reasoning-parser and/or --reasoning-config to use thinking_token_budget.",
            "Please set attention.engine_args.reasoning_parser and/or attention.engine_args.reasoning_config to use "
            "thinking_token_budget.",
        ),
        (
            "You must set `--enable-prompt-embeds` to input `prompt_embeds`",
            "You must set `attention.engine_args.enable_prompt_embeds` to input `prompt_embeds`",
        ),
        (
            "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding.",
            "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding "
            "(attention.speculative_tokens).",
        ),
        (
            "LM Format Enforcer backend does not support speculative tokens",
            "LM Format Enforcer backend does not work with attention.speculative_tokens",
        ),
        ("temperature must be non-negative, got -1.0.", "temperature must be non-negative, got -1.0."),
        ("no such option: --tool-call-parsers, nor -- or ---x", "no such option: --tool-call-parsers, nor -- or ---x"),
        ("--tokenizer is not ours to set", "--tokenizer is not ours to set"),
    ],
)
def test_messages_name_our_keys(theirs: str, ours: str) -> None:
    assert in_our_words(error(theirs)) == error(ours)
    assert in_our_words(error(ours)) == error(ours)


@given(st.text(), st.sampled_from([*PHRASES, b"--tool-call-parser", b""]), st.text())
def test_a_body_stays_json_around_what_changes(before: str, about: bytes, after: str) -> None:
    said = json.loads(in_our_words(error(before + about.decode() + after)))["error"]["message"]
    assert said.startswith(before.rstrip("-"))
    assert said.endswith(after.lstrip("-abcdefghijklmnopqrstuvwxyz0123456789"))


# --- held to the vLLM that is installed ---

_FLAG = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
_ANSWERED = ("entrypoints", "renderers", "inputs", "multimodal", "parser", "reasoning", "tool_parsers",
             "v1/engine/input_processor.py", "v1/structured_output", "sampling_params.py")  # fmt: skip
# Errors of the start, of other tasks than generation, or of vLLM's own command line.
_NOT_ANSWERED = ("entrypoints/cli", "entrypoints/launchers", "entrypoints/pooling", "entrypoints/grpc_server.py",
                 "entrypoints/llm.py", "parser/parser_manager.py", "entrypoints/offline_utils.py")  # fmt: skip
_NOT_SAID = {"--skip-tokenizer-init"}  # only where it is set, and `deepsplit validate` refuses it


def sources() -> Iterator[Path]:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    root = Path(spec.origin).parent
    for place in _ANSWERED:
        for path in [root / place] if place.endswith(".py") else (root / place).rglob("*.py"):
            if not str(path.relative_to(root)).startswith(_NOT_ANSWERED):
                yield path


def texts(tree: ast.AST) -> str:
    """All string constants in it, put together."""
    return "".join(
        one.value for one in ast.walk(tree) if isinstance(one, ast.Constant) and isinstance(one.value, str)
    )


def errors(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        answers = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("create_error_response")
        named = isinstance(node, ast.AnnAssign | ast.AugAssign)  # a text that is raised elsewhere
        if isinstance(node, ast.Raise) or answers or named:
            yield texts(node)


def test_every_flag_in_an_error_of_this_vllm_has_a_key() -> None:
    said = {flag: (path.name, text) for path in sources() for text in errors(path) for flag in _FLAG.findall(text)}
    assert {"--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser"} <= said.keys()
    for flag, (where, text) in said.items():
        if flag in _NOT_SAID:
            continue
        words = in_our_words(text.encode()).decode()
        assert not re.search(rf"{flag}(?![a-z-])", words), f"{where}: {text}"


def test_every_phrase_is_still_vllms() -> None:
    said = "\n".join(texts(ast.parse(path.read_text())) for path in sources())
    for phrase in PHRASES:
        assert phrase.decode() in said


def test_no_message_names_a_key_that_validate_refuses() -> None:
    for name in EngineArguments.__annotations__:
        words = in_our_words(b"--" + name.replace("_", "-").encode()).decode()
        refused = any(name in names for names in REFUSED.values())
        assert words.startswith("--" if refused else "attention.engine_args.")
