from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.errors import CheckpointError, StartupError
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


def test_vllm_waits_for_its_engine_as_long_as_we_do(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        assert engine_env(make(tmp_path, MLA, device=device))["VLLM_ENGINE_READY_TIMEOUT_S"] == "600"
