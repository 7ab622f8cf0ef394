from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import CheckpointError, StartupError
from cluster.plan.cores import ComputeProcess, pinned_share, regular_host, unpinned_share
from deployments.attention.engine_args import REMOTE_OPS, engine_args, engine_env

MLA = {"kv_lora_rank": 512, "dtype": "bfloat16"}


def make(folder: Path, hf_config: dict[str, Any] | None, **attention: Any) -> Config:
    if hf_config is not None:
        (folder / "config.json").write_text(json.dumps(hf_config))
    return Config.model_validate({"model": {"path": str(folder)}, "attention": attention})


def test_mla_on_cpu_gets_the_kernel_that_is_right(tmp_path: Path) -> None:
    args = engine_args(make(tmp_path, MLA, speculative_tokens=2, kv_cache_gib=0.5), {}, "auto", ())
    assert args["enforce_eager"]
    assert args["kv_cache_memory_bytes"] == 2**29
    assert args["compilation_config"] == {"custom_ops": ["all", "-rotary_embedding"]}
    assert args["attention_config"] == {"backend": "CPU_MLA"}
    assert args["speculative_config"] == {
        "method": "mtp", "num_speculative_tokens": 2, "attention_backend": "CPU_MLA",
    }  # fmt: skip


def test_a_model_without_mla_keeps_vllms_choices(tmp_path: Path) -> None:
    args = engine_args(make(tmp_path, {"num_experts": 8}), {}, "auto", ())
    assert not {"attention_config", "block_size", "compilation_config", "speculative_config"} & set(args)


@pytest.mark.parametrize(
    ("hf_config", "configured", "dtype"),
    [
        ({"dtype": "float32"}, "auto", "float32"),
        ({"torch_dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "auto", "float16"),
        ({"dtype": "float32"}, "bfloat16", "bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "auto", "auto"),
        ({}, "auto", "auto"),
    ],
)
def test_auto_dtype_is_the_checkpoints(tmp_path: Path, hf_config: dict[str, Any], configured: str, dtype: str) -> None:
    config = make(tmp_path, hf_config)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": configured})})
    assert engine_args(config, {}, "auto", ())["dtype"] == dtype


def test_split_on_cuda_cuts_graphs_at_the_remote_experts(tmp_path: Path) -> None:
    split = {"deepsplit": {"placement_file": "/x"}}
    cuda = make(tmp_path, MLA, device="cuda", tensor_parallel_size=8)
    args = engine_args(cuda, split, "deepsplit", ["vllm::attention"])
    assert args["compilation_config"] == {
        "splitting_ops": ["vllm::attention", *REMOTE_OPS], "cudagraph_mode": "NONE",
    }  # fmt: skip
    assert args["tensor_parallel_size"] == 8
    assert args["load_format"] == "deepsplit"
    assert args["additional_config"] == split
    assert args["worker_cls"] == "deployments.attention.engine_worker.RequestIdsWorker"
    eager = make(tmp_path, MLA, device="cuda", engine_args={"enforce_eager": True})
    assert "compilation_config" not in engine_args(eager, split, "deepsplit", ["vllm::attention"])


def test_engine_args_of_the_configuration_have_the_last_word(tmp_path: Path) -> None:
    mine = {"block_size": 32, "seed": 3, "compilation_config": {"mode": 0}}
    args = engine_args(make(tmp_path, MLA, engine_args=mine, max_model_len=99), {}, "auto", ())
    assert args["compilation_config"] == {"custom_ops": ["all", "-rotary_embedding"], "mode": 0}
    assert (args["block_size"], args["seed"], args["max_model_len"]) == (32, 3, 99)


@pytest.mark.parametrize("content", [None, "{"])
def test_an_unreadable_checkpoint_is_named(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read.*set model\.path"):
        engine_args(make(tmp_path, None), {}, "auto", ())


def test_threads_are_counted_on_cpu_only(tmp_path: Path) -> None:
    assert engine_env(make(tmp_path, MLA, threads=3))["OMP_NUM_THREADS"] == "3"
    assert engine_env(make(tmp_path, MLA))["TORCH_COMPILE_DISABLE"] == "1"
    assert "OMP_NUM_THREADS" not in engine_env(make(tmp_path, MLA, device="cuda"))


def test_compiled_code_stays_between_starts(tmp_path: Path) -> None:
    config = make(tmp_path, MLA, compile=True, compile_cache=str(tmp_path / "a" / "b"))
    args, env = engine_args(config, {}, "auto", ()), engine_env(config)
    assert not args["enforce_eager"]
    assert "compilation_config" not in args
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert "TORCH_COMPILE_DISABLE" not in env


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = make(tmp_path, MLA, compile=True, compile_cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(StartupError, match=r"attention\.compile_cache: .*/cache cannot be made \(Not a directory\)"):
        engine_env(config)


def test_a_node_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StartupError, match=r"needs a C\+\+ compiler on the node: install g\+\+, or set it to false"):
        engine_env(make(tmp_path, MLA, compile=True, compile_cache=str(tmp_path / "cache")))


def test_ranks_are_ray_actors_on_gpus_and_child_processes_on_cpu(tmp_path: Path) -> None:
    cuda = make(tmp_path, MLA, device="cuda", tensor_parallel_size=4, placement={"num_gpus": 2})
    assert engine_args(cuda, {}, "deepsplit", ())["distributed_executor_backend"] == "ray"
    assert engine_env(cuda)["VLLM_RAY_PER_WORKER_GPUS"] == "0.5"
    cpu = make(tmp_path, MLA, tensor_parallel_size=2)
    assert engine_args(cpu, {}, "deepsplit", ())["distributed_executor_backend"] == "mp"


def test_cores_of_a_pinned_replica_go_to_its_ranks(tmp_path: Path) -> None:
    process, host = ComputeProcess("attention-0", 4), regular_host(8)
    config = make(tmp_path, MLA, threads=2, tensor_parallel_size=2)
    env = engine_env(config, pinned_share(host, process, (2, 3, 4, 6), spin=False))
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "2-3|4,6"
    assert (env["OMP_PLACES"], env["OMP_PROC_BIND"]) == ("{2,3,4,6}", "true")
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"]) == ("2", "PASSIVE")
    assert "GOMP_SPINCOUNT" in engine_env(config, pinned_share(host, process, (2, 3, 4, 6), spin=True))


def test_a_replica_that_is_not_pinned_counts_threads_and_lets_them_sleep(tmp_path: Path) -> None:
    for share in (None, unpinned_share(regular_host(8), ComputeProcess("attention-0", 3))):
        env = engine_env(make(tmp_path, MLA, threads=3), share)
        assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
        assert not {"OMP_PLACES", "OMP_PROC_BIND", "GOMP_SPINCOUNT"} & set(env)


def test_openmp_keeps_the_engines_threads_on_the_cores_that_it_is_told(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    share = pinned_share(regular_host(core + 1), ComputeProcess("attention-0", 1), (core,), spin=False)
    env = os.environ | engine_env(make(tmp_path, MLA, threads=1), share)
    # The child's first thread starts on all cores, as the engine's does; another one is started later.
    script = (
        "import os, threading, torch\n"
        "said = [os.sched_getaffinity(0)]\n"
        "later = threading.Thread(target=lambda: said.append(os.sched_getaffinity(0)))\n"
        "later.start(); later.join(); print(*map(sorted, said))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"[{core}] [{core}]", done.stderr


def test_vllm_waits_for_its_engine_as_long_as_we_do(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        assert engine_env(make(tmp_path, MLA, device=device))["VLLM_ENGINE_READY_TIMEOUT_S"] == "600"


def test_the_models_dialect_names_the_parsers_and_engine_args_have_the_last_word(tmp_path: Path) -> None:
    sparse = {"model_type": "deepseek_v32", "dtype": "bfloat16"}
    parsers = {"enable_auto_tool_choice": True, "tool_call_parser": "deepseek_v32", "reasoning_parser": "deepseek_v3"}
    for asked, found in (
        ({}, {}),
        ({"dialect": "auto"}, parsers),
        ({"dialect": "auto", "engine_args": {"reasoning_parser": "deepseek_r1"}},
         parsers | {"reasoning_parser": "deepseek_r1"}),
    ):  # fmt: skip
        args = engine_args(make(tmp_path, sparse, **asked), {}, "auto", ())
        assert {name: args[name] for name in parsers if name in args} == found


def test_a_model_that_does_not_reason_gets_no_parser_for_it(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("tool▁call")
    args = engine_args(make(tmp_path, {"model_type": "deepseek_v3", "dtype": "bfloat16"}, dialect="auto"), {}, "a", ())
    assert args["tool_call_parser"] == "deepseek_v3"
    assert "reasoning_parser" not in args
