import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.config import Config
from cluster.config.file import load_config
from cluster.errors import CheckpointError, ConfigError, PlanError
from cluster.model.spec import load_model_spec
from cluster.plan.checks import load_model, plan_for
from cluster.plan.nodes import GIB, load_nodes
from cluster.plan.plan import Plan, model_facts, to_json
from cluster.plan.text import plan_text
from tests.tiny_checkpoint import EXPERTS, HIDDEN, INNER, write_tiny_checkpoint

EXAMPLES = Path(__file__).parents[4] / "examples"


def plan(folder: Path, nodes: str = "", **sections: object) -> Plan:
    config = Config.model_validate({"model": {"path": write_tiny_checkpoint(folder / "m")}, **sections})
    nodes_file = folder / "nodes.yaml"
    nodes_file.write_text(nodes or "- {name: n, memory_gib: 100}")
    return plan_for(config, load_model(config)[0], nodes_file)


def test_memory_of_each_process(tmp_path: Path) -> None:
    made = plan(tmp_path, experts={"workers": 2, "shares": [3, 1]}, attention={"kv_cache_gib": 0.25})
    expert_bytes = 3 * HIDDEN * INNER * 4
    weights = {need.name: need.weights_bytes for need in made.processes}
    assert weights["experts-0"] == 3 * expert_bytes
    assert weights["experts-1"] == 1 * expert_bytes
    assert made.model.expert_bytes_in_memory == expert_bytes
    attention = next(need for need in made.processes if need.role == "attention")
    assert attention.kv_cache_bytes == GIB // 4
    # MLA: latent 6 + rotary key 2, in 2 layers, float32.
    assert made.model.kv_bytes_per_token == (6 + 2) * 2 * 4
    assert made.kv_cache_tokens == GIB // 4 // made.model.kv_bytes_per_token
    assert [worker.expert_ids for worker in made.workers] == [(0, 1, 2), (3,)]


def test_experts_in_another_dtype(tmp_path: Path) -> None:
    assert plan(tmp_path, experts={"dtype": "bfloat16"}).model.expert_bytes_in_memory == 3 * HIDDEN * INNER * 2


def test_rows_that_a_worker_computes_at_once_take_memory(tmp_path: Path) -> None:
    def overhead_bytes(rows: int) -> int:
        made = plan(tmp_path / str(rows), dispatch={"batch_rows": rows})
        return next(need.overhead_bytes for need in made.processes if need.role == "experts")

    top_k, size = 2, 4
    per_row = HIDDEN * (size + 4) + top_k * size * (2 * HIDDEN + 3 * INNER)
    assert overhead_bytes(4096) - overhead_bytes(1024) == 3072 * per_row


def test_does_not_fit(tmp_path: Path) -> None:
    made = plan(tmp_path, "- {name: small, memory_gib: 8}", attention={"kv_cache_gib": 20})
    with pytest.raises(PlanError) as caught:
        made.check()
    assert "attention-0: needs 23.30 GiB of memory, but small, the node with most room, has 6.50 GiB left" in str(
        caught.value
    )
    assert "lower attention.kv_cache_gib" in str(caught.value)
    assert "fits       no" in plan_text(made)
    assert json.loads(to_json(made))["fits"] is False


CORES = "- {name: n, memory_gib: 100, cores: 8, threads_per_core: 2, numa_nodes: 2}"


def test_cores_of_each_process_where_a_nodes_cores_are_told(tmp_path: Path) -> None:
    made = plan(tmp_path, CORES, attention={"threads": 3}, experts={"workers": 2, "threads": 2})
    lines = [line.split(maxsplit=2) for line in plan_text(made).splitlines() if "of NUMA node" in line]
    assert [" ".join(" ".join(line).split()) for line in lines] == [
        "cores attention-0 n cores 1-3 of NUMA node 0, 3 threads, pinned, waiting threads spin briefly",
        "experts-0 n cores 4-5 of NUMA node 1, 2 threads, pinned, waiting threads spin briefly",
        "experts-1 n cores 6-7 of NUMA node 1, 2 threads, pinned, waiting threads spin briefly",
    ]
    assert json.loads(to_json(made))["cores"][1]["cores"] == [4, 5]


def test_cores_on_a_joined_cluster_do_not_spin_and_unknown_ones_are_not_planned(tmp_path: Path) -> None:
    joined = {"ray": {"address": "auto"}, "attention": {"threads": 1}}
    assert [share.spin for share in plan(tmp_path, CORES, **joined).cores] == [False] * 3
    assert [share.spin for share in plan(tmp_path, CORES, attention={"threads": 1}).cores] == [True] * 3
    assert not plan(tmp_path, **joined).cores


def test_always_pinned_without_enough_cores(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="experts-0: pin_cores is always, but 16 core"):
        plan(tmp_path, CORES, experts={"workers": 1, "threads": 16, "pin_cores": "always"})


def test_more_workers_than_experts(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"5 expert workers for {EXPERTS} copies"):
        plan(tmp_path, experts={"workers": 5})


def test_drafting_without_a_drafting_layer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no Multi-Token Prediction layer: set it to 0"):
        plan(tmp_path, attention={"speculative_tokens": 1})


def test_longer_than_the_model_knows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 65, but the model knows positions up to 64"):
        plan(tmp_path, attention={"max_model_len": 65})


def test_model_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(Config.model_validate({"model": {"path": tmp_path / "nope"}}))


def test_roles_that_want_different_nodes_are_refused_locally(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": {"path": write_tiny_checkpoint(tmp_path)},
            "attention": {"placement": {"labels": {"role": "a"}}},
            "experts": {"placement": {"labels": {"role": "b"}}},
        }
    )
    with pytest.raises(PlanError, match=r"set ray\.address"):
        plan_for(config, load_model(config)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", "expected a list of nodes"),
        ("- {name: a}", "node 1.memory_gib: Field required"),
        ("- {name: a, memory_gib: 1, gpu: 2}", r"node 1.gpu: .*\(valid: name, count"),
        ("[", "cannot read the nodes"),
    ],
)
def test_bad_nodes_file(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "nodes.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_nodes(tmp_path / "nodes.yaml")


# --- the files in examples/ --------------------------------------------------------------------------------


def test_deepseek_v3_fits_its_nodes() -> None:
    config = load_config(EXAMPLES / "deepseek-v3.yaml")
    made = plan_for(config, load_model(config)[0], EXAMPLES / "deepseek-v3" / "nodes.yaml")
    made.check()
    assert made.model.moe_layers == 59
    # The model card: 671 B parameters and 14 B of the MTP module, all but a few in FP8.
    assert made.model.checkpoint_bytes == pytest.approx(688.6e9, rel=1e-3)
    assert made.model.kv_bytes_per_token == (512 + 64) * 62 * 2
    assert {need.node for need in made.processes if need.role == "experts"} == {f"cpu-{i}" for i in range(8)}
    assert {need.node for need in made.processes if need.role == "attention"} == {"gpu-0", "gpu-1"}


def test_deepseek_v32_fits_its_nodes_without_a_gpu() -> None:
    config = load_config(EXAMPLES / "deepseek-v3.2.yaml")
    spec = load_model(config)[0]
    made = plan_for(config, spec, EXAMPLES / "deepseek-v3.2" / "nodes.yaml")
    made.check()
    dense = load_model_spec(EXAMPLES / "deepseek-v3")
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)  # 14 M a layer
    assert spec.attention_params - dense.attention_params == 61 * indexer
    assert spec.mtp_attention_params - dense.mtp_attention_params == indexer
    assert made.model.kv_bytes_per_token == (512 + 64 + 128) * 62 * 2


def test_keys_of_the_indexer_are_fp8_on_gpus() -> None:
    config = load_config(EXAMPLES / "deepseek-v3.2.yaml")
    on_gpu = config.model_copy(update={"attention": config.attention.model_copy(update={"device": "cuda"})})
    facts = model_facts(on_gpu, load_model(config)[0])
    assert facts.kv_bytes_per_token == ((512 + 64) * 2 + 128 + 4) * 62


def test_sparse_attention_is_not_compiled_on_cpu() -> None:
    config = load_config(EXAMPLES / "deepseek-v3.2.yaml")
    compiled = config.model_copy(update={"attention": config.attention.model_copy(update={"compile": True})})
    with pytest.raises(ConfigError, match="does not compile sparse attention"):
        load_model(compiled)


@pytest.mark.parametrize(("model", "tensors"), [("deepseek-v3", 91991), ("deepseek-v3.2", 92425)])
def test_indexes_are_the_generated_ones(model: str, tensors: int) -> None:
    folder = EXAMPLES / model
    namespace: dict[str, object] = {"__name__": "make_index"}
    exec(compile((EXAMPLES / "make_index.py").read_text(), "make_index.py", "exec"), namespace)
    text = namespace["index"](json.loads((folder / "config.json").read_text()))  # type: ignore[operator]
    assert (folder / "model.safetensors.index.json").read_text() == text
    weight_map = json.loads(text)["weight_map"]
    assert len(weight_map) == tensors
    assert len(set(weight_map.values())) == 163
    assert "model.layers.61.mlp.experts.255.down_proj.weight_scale_inv" in weight_map
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in weight_map
    assert ("model.layers.61.self_attn.indexer.wk.weight_scale_inv" in weight_map) is (model == "deepseek-v3.2")


@pytest.mark.parametrize(("file", "said"), [
    ("deepseek-v3.yaml", "ok  index: 91991 tensors in 163 shard(s)"),
    ("deepseek-v3.2.yaml", "1 MTP layer(s), sparse attention to 2048 tokens"),
])  # fmt: skip
def test_commands_on_the_files_of_large_models(file: str, said: str) -> None:
    validated = CliRunner().invoke(cli, ["validate", str(EXAMPLES / file)])
    assert validated.exit_code == 0
    assert said in validated.output
    planned = CliRunner().invoke(cli, ["plan", str(EXAMPLES / file), "--json"])
    assert planned.exit_code == 0
    assert json.loads(planned.output)["fits"] is None


def test_local_file_is_valid() -> None:
    config = load_config(EXAMPLES / "local.yaml")
    assert config.model.path.resolve() == EXAMPLES.parent / "models" / "demo"
    assert (config.gateway.host, config.gateway.port, config.experts.workers) == ("127.0.0.1", 8000, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp8_experts_stay_fp8_in_memory(device: str) -> None:
    config = Config.model_validate(
        {"model": {"path": EXAMPLES / "deepseek-v3", "dtype": "bfloat16"}, "experts": {"device": device}}
    )
    facts = model_facts(config, load_model_spec(EXAMPLES / "deepseek-v3"))
    assert facts.expert_form == "fp8"
    weights, blocks = 3 * 7168 * 2048, 3 * 56 * 16
    assert facts.expert_bytes_in_memory == weights + 4 * blocks


@pytest.mark.parametrize(("dtype", "device", "linear_bytes"), [
    ("bfloat16", "cpu", 1), ("float32", "cpu", 4), ("float16", "cpu", 2), ("bfloat16", "cuda", 1),
    ("float16", "cuda", 1),
])  # fmt: skip
def test_fp8_linears_of_attention_stay_fp8_where_they_can(dtype: str, device: str, linear_bytes: int) -> None:
    model, attention = {"path": EXAMPLES / "deepseek-v3", "dtype": dtype}, {"device": device}
    spec = load_model_spec(EXAMPLES / "deepseek-v3")
    facts = model_facts(Config.model_validate({"model": model, "attention": attention}), spec)
    embeddings = 2 * spec.vocab_size * spec.hidden_size
    expected = (spec.attention_params - embeddings) * linear_bytes + embeddings * (4 if dtype == "float32" else 2)
    assert facts.attention_weight_bytes == expected
