"""What `validate` knows of vLLM's arguments: their names, their types, and those that cannot work here."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import Config
from cluster.config.engine_args import REFUSED
from cluster.config.vllm_arguments import REASONING_PARSERS, TOOL_PARSERS, VLLM_VERSION, EngineArguments
from tests.unit.cluster.config.test_file import problems

ARGS = "attention.engine_args"
DOCS = Path(__file__).parents[4] / "docs"


def refused(folder: Path, engine_args: str, attention: str = "device: cuda") -> list[str]:
    """The problems with a file whose line 2 has these engine arguments, without their line number."""
    text = f"model: {{path: m}}\nattention: {{{attention}, engine_args: {{{engine_args}}}}}\n"
    return [problem.removeprefix("  line 2: ") for problem in problems(folder, text)]


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        ("max_num_batched_tokns: 8", f"{ARGS}.max_num_batched_tokns: unknown key; did you mean {ARGS}.max_num_batched"),
        ("max-num-batched-tokens: 8", f"{ARGS}.max-num-batched-tokens: unknown key; did you mean {ARGS}.max_num_batch"),
        ("max_prompt_tokens: 8", f"{ARGS}.max_prompt_tokens: unknown key; did you mean gateway.max_prompt_tokens?"),
        ("frobnicate: 8", f"{ARGS}.frobnicate: unknown key; no valid one is like it"),
        ("_api_process_count: 2", f"{ARGS}._api_process_count: unknown key"),
        ("max_num_batched_tokens: many", f"{ARGS}.max_num_batched_tokens: must be a whole number, but is 'many'"),
        ("max_num_batched_tokens: 2.5", f"{ARGS}.max_num_batched_tokens: must be a whole number, but is 2.5"),
        ("gpu_memory_utilization: '0.9'", f"{ARGS}.gpu_memory_utilization: must be a number, but is '0.9'"),
        ("enable_auto_tool_choice: 'yes'", f"{ARGS}.enable_auto_tool_choice: must be true or false, but is 'yes'"),
        ("tool_call_parser: [a]", f"{ARGS}.tool_call_parser: must be text, but is a list"),
        ("scheduling_policy: lifo", f"{ARGS}.scheduling_policy: must be one of fcfs or priority, but is 'lifo'"),
        ("allowed_media_domains: a.b", f"{ARGS}.allowed_media_domains: must be a list, such as [a, b], but is 'a.b'"),
        ("default_chat_template_kwargs: 1", f"{ARGS}.default_chat_template_kwargs: must be a section of `key: value`"),
    ],
)
def test_names_and_types_are_known(tmp_path: Path, engine_args: str, expected: str) -> None:
    (problem,) = refused(tmp_path, engine_args)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("attention", "engine_args", "expected"),
    [
        ("device: cpu", "enforce_eager: false", "enforce_eager: is set by attention.compile (false) on CPU: leave it"),
        ("compile: true", "enforce_eager: true", "enforce_eager: is set by attention.compile (true) on CPU: leave it"),
        ("device: cpu", "kv_cache_memory_bytes: 1", "kv_cache_memory_bytes: has no effect on CPU: use attention.kv"),
        ("device: cpu", "gpu_memory_utilization: 1", "gpu_memory_utilization: has no effect on CPU: use attention.kv"),
        ("device: cuda", "data_parallel_size: 2", "data_parallel_size: cannot be set here: the experts are on workers"),
        ("device: cuda", "pipeline_parallel_size: 2", "pipeline_parallel_size: cannot be set here: a replica is one n"),
        ("device: cuda", "max_num_seqs: 2", "max_num_seqs: cannot be set here: use attention.max_num_seqs"),
        ("device: cuda", "served_model_name: a", "served_model_name: cannot be set here: use model.name and model.ali"),
        ("device: cuda", "disable_log_stats: true", "disable_log_stats: cannot be set here: the gateway admits"),
        ("device: cuda", "compilation_config: {cudagraph_mode: full_and_piecewise}",
         "compilation_config.cudagraph_mode: a full graph would span"),
        ("device: cuda", "speculative_config: {method: mtp}", "speculative_config.method: cannot be set here: use att"),
        ("speculative_tokens: 1", "speculative_config: {num_speculative_tokens: 2}",
         "speculative_config.num_speculative_tokens: is set by attention.speculative_tokens (1)"),
        ("device: cuda", "tool_call_parser: deepseekv3", f"tool_call_parser: vLLM {VLLM_VERSION} has no parser"),
        ("device: cuda", "reasoning_parser: xyz", f"reasoning_parser: vLLM {VLLM_VERSION} has no parser"),
        ("device: cuda", "enable_auto_tool_choice: true", "enable_auto_tool_choice: needs tool_call_parser too"),
        ("speculative_tokens: 1", "logits_processors: [a.B]", "logits_processors: cannot run while tokens are drafted"),
        ("device: cuda", "additional_config: {deepsplit: {}}", "additional_config.deepsplit: is what deepsplit tells"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_reason(
    tmp_path: Path, attention: str, engine_args: str, expected: str
) -> None:
    (problem,) = refused(tmp_path, engine_args, attention)
    assert problem.startswith(f"{ARGS}.{expected}")


def test_all_refusals_come_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = "model: {path: m}\nattention:\n  engine_args:\n    enforce_eager: false\n    dtype: float16\n"
    assert [problem.split(":")[0] for problem in problems(tmp_path, text)] == ["  line 4", "  line 5"]


def test_what_can_work_is_passed_on_as_it_is() -> None:
    given = {
        "enforce_eager": True, "seed": 3, "max_num_batched_tokens": None, "tool_call_parser": "deepseek_v3",
        "enable_auto_tool_choice": True, "default_chat_template_kwargs": {"thinking": True}, "cpu_offload_gb": 4,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "additional_config": {"x": 1},
    }  # fmt: skip
    config = Config.model_validate({"model": {"path": "m"}, "attention": {"engine_args": given}})
    assert config.attention.engine_args == given
    assert Config.model_validate_json(config.model_dump_json()) == config
    plugin = {"tool_call_parser": "mine", "tool_parser_plugin": "/mine.py", "enable_auto_tool_choice": True}
    Config.model_validate({"model": {"path": "m"}, "attention": {"engine_args": plugin}})
    cuda = {"device": "cuda", "engine_args": {"enforce_eager": False, "gpu_memory_utilization": 0.9}}
    Config.model_validate({"model": {"path": "m"}, "attention": cuda})


def test_every_refused_argument_is_one_of_vllm_and_refused_once() -> None:
    names = [name for refused in REFUSED.values() for name in refused]
    assert len(names) == len(set(names))
    assert set(names) <= set(EngineArguments.__annotations__)


def test_the_examples_of_the_operators_page_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "operations.md").read_text(encoding="utf-8"), re.DOTALL)
    made = [Config.model_validate({"model": {"path": "m"}, **yaml.safe_load(block)}) for block in blocks]
    assert [bool(config.attention.engine_args) for config in made].count(True) == 1


def test_the_parsers_that_the_operators_page_names_are_there() -> None:
    rows = [line.split("|") for line in (DOCS / "operations.md").read_text(encoding="utf-8").splitlines()]
    models = [row for row in rows if len(row) > 4 and row[1].startswith(" DeepSeek-")]
    assert len(models) == 3
    for row in models:
        assert re.findall(r"`(\w+)`", row[2])[0] in TOOL_PARSERS
        assert set(re.findall(r"`(deepseek_\w+)`", row[3])) <= set(REASONING_PARSERS)
