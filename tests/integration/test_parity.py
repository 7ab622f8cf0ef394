"""The split gives the same tokens: transformers, unsplit vLLM, and vLLM split over workers with uneven shares.

float32, greedy, 20 prompts x 64 tokens each. One split engine serves all worker sets of a checkpoint in turn, because
an engine's start costs more than its run. Checkpoints are random (`tests.checkpoints`); the demo model is trained.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.config import DispatchConfig
from tests.checkpoint_edits import dequantised, routed_expert, without
from tests.engines import Engine
from tests.expert_processes import ExpertPlane
from tests.reference import Reference, greedy_reference, make_prompts, score_reference
from tests.tiny_tokenizer import VOCAB_SIZE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

PROMPTS, TOKENS = 20, 64
# Shares of 1, 2 and 3 workers. Consecutive experts go to one worker, so these are also different cuts through groups.
SHARES: Sequence[Sequence[float]] = ([1], [3, 1], [1, 2, 4])
# 60 experts on 7 workers: 9 or 8 each.
SEVEN: Sequence[Sequence[float]] = ([1] * 7,)
MTP: Mapping[str, Any] = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
# Seed 0 has a step whose last chosen expert leads the next one by 5e-7: which one wins depends on the processor. The
# narrowest routing choice of seed 2 is 5e-5.
PROMPT_SEEDS: Mapping[str, int] = {"qwen3_moe": 2}
# Two float32 programs of this size differ by about 3e-5 in log-probability; a margin below that would be luck.
MIN_MARGIN, MAX_LOGPROB_DIFFERENCE = 1e-4, 2e-4

# As attention.compile sets it.
NO_AOT: Mapping[str, str] = {"VLLM_USE_AOT_COMPILE": "0"}

Checkpoint = Callable[..., Path]
Prompts = list[list[int]]


def _reference(checkpoint: Path, prompts: Prompts) -> Reference:
    reference = greedy_reference(checkpoint, prompts, TOKENS)
    assert reference.margin > MIN_MARGIN, f"choose other prompts: two tokens are within {reference.margin:.1e}"
    return reference


def _expect(reference: Reference, engine: Engine, prompts: Prompts, what: str) -> None:
    run = engine.generate(prompts, TOKENS)
    assert reference.difference(run.token_ids) is None, f"{what}: {reference.difference(run.token_ids)}"
    furthest = max(
        abs(a - b)
        for ours, theirs in zip(reference.logprobs, run.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert furthest < MAX_LOGPROB_DIFFERENCE, f"{what}: log-probabilities differ by up to {furthest:.1e}"


def _expect_split(
    reference: Reference,
    checkpoint: Path,
    folder: Path,
    prompts: Prompts,
    shares: Sequence[Sequence[float]],
    *,
    experts_from: Path | None = None,
    engine_args: Mapping[str, Any] | None = None,
    compiled: bool = False,
    form: str = "auto",
) -> int:
    """Every worker set in turn behind one engine; returns how many drafted tokens were accepted."""
    with ExpertPlane(experts_from or checkpoint, folder) as plane:
        sets = [plane.start(of_set, form=form) for of_set in shares]
        plane.publish(sets[0])
        args = {**plane.engine_args, **(engine_args or {})}
        with Engine(checkpoint, engine_args=args, eager=not compiled, environment=NO_AOT) as engine:
            for of_set, workers in zip(shares, sets, strict=True):
                plane.publish(workers)
                _expect(reference, engine, prompts, f"split over {len(of_set)} workers")
            return engine.generate(prompts[:1], 1).accepted


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ("q_lora_groups", SHARES), ("no_q_lora", SHARES[1:2]), ("one_group", SHARES[2:]), ("two_shared", SHARES[1:2]),
        ("sixty_experts", SEVEN), ("qwen3_moe", SHARES),
    ],
)  # fmt: skip
def test_every_shape(
    random_checkpoint: Checkpoint, tmp_path: Path, shape: str, shares: Sequence[Sequence[float]]
) -> None:
    checkpoint = random_checkpoint(shape, shards=2)
    prompts = make_prompts(PROMPTS, VOCAB_SIZE, seed=PROMPT_SEEDS.get(shape, 0))
    reference = _reference(checkpoint, prompts)
    with Engine(checkpoint) as unsplit:
        _expect(reference, unsplit, prompts, "unsplit")
    _expect_split(reference, checkpoint, tmp_path, prompts, shares)


def test_each_half_lives_without_the_other_halfs_tensors(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole, prompts = random_checkpoint("q_lora_groups", shards=2), make_prompts(PROMPTS, VOCAB_SIZE)
    attention = without(whole, tmp_path / "attention", routed_expert)
    experts = without(whole, tmp_path / "experts", lambda name: not routed_expert(name))
    _expect_split(_reference(whole, prompts), attention, tmp_path, prompts, SHARES[1:2], experts_from=experts)


def test_mtp_changes_nothing(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint, prompts = random_checkpoint("mtp"), make_prompts(PROMPTS, VOCAB_SIZE)
    _expect_split(_reference(checkpoint, prompts), checkpoint, tmp_path, prompts, SHARES[1:2], engine_args=MTP)


def test_compiling_the_attention_half_changes_nothing(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint, prompts = random_checkpoint("mtp"), make_prompts(PROMPTS, VOCAB_SIZE)
    reference = _reference(checkpoint, prompts)
    assert _expect_split(reference, checkpoint, tmp_path, prompts, SHARES[1:2], engine_args=MTP, compiled=True) > 0


def test_two_ranks_give_the_tokens_of_one(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint, prompts = random_checkpoint("q_lora_groups"), make_prompts(PROMPTS, VOCAB_SIZE)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    _expect_split(_reference(checkpoint, prompts), checkpoint, tmp_path, prompts, SHARES[1:2], engine_args=ranks)


def test_fp8_experts_equal_their_dequantised_selves(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint, prompts = random_checkpoint("fp8"), make_prompts(PROMPTS, VOCAB_SIZE)
    twin = dequantised(checkpoint, tmp_path / "plain")
    reference = _reference(twin, prompts)
    _expect_split(reference, checkpoint, tmp_path, prompts, SHARES[1:2], form="float32")
    # Held as FP8 they are multiplied with bfloat16 rows.
    sequences = [prompt + ids for prompt, ids in zip(prompts, reference.token_ids, strict=True)]
    with ExpertPlane(checkpoint, tmp_path) as plane:
        plane.publish(plane.start(SHARES[1]))
        with Engine(checkpoint, engine_args=plane.engine_args) as engine:
            held_as_fp8 = engine.score(sequences)
    assert 0 < _mean_difference(held_as_fp8, score_reference(twin, sequences)) < 0.03


def test_a_checkpoint_as_released_equals_its_dequantised_self(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint, prompts = random_checkpoint("released_fp8", shards=3), make_prompts(PROMPTS, VOCAB_SIZE)
    twin = dequantised(checkpoint, tmp_path / "plain")
    reference = _reference(twin, prompts)
    _expect_split(reference, checkpoint, tmp_path, prompts, SHARES[1:2], engine_args=MTP, form="float32")
    # As it is stored, both halves are multiplied with bfloat16 rows: as near as the dequantised model in bfloat16.
    sequences = [prompt + ids for prompt, ids in zip(prompts, reference.token_ids, strict=True)]
    exact, differences = score_reference(twin, sequences), []
    for model, form in ((checkpoint, "auto"), (twin, "bfloat16")):
        with ExpertPlane(model, tmp_path, dtype="bfloat16") as plane:
            plane.publish(plane.start(SHARES[1], form=form))
            with Engine(model, dtype="bfloat16", engine_args=plane.engine_args) as engine:
                differences.append(_mean_difference(engine.score(sequences), exact))
    assert 0 < differences[0] < 1.5 * differences[1]


class TestDemoModel:
    """The trained model, on text of its own kind."""

    @pytest.fixture(scope="class")
    def case(self, demo_model: Path) -> tuple[Prompts, Reference]:
        """20 prompts and what must follow: those of 26 whose continuations come least near to a tie."""
        ids: list[int] = AutoTokenizer.from_pretrained(demo_model).encode(inspect.getsource(textwrap))
        prompts = [ids[100 * i : 100 * i + (8, 16, 24, 48)[i % 4]] for i in range(PROMPTS + 6)]
        reference = greedy_reference(demo_model, prompts, TOKENS)
        clearest = sorted(range(len(prompts)), key=lambda i: -min(reference.margins[i]))[:PROMPTS]
        return [prompts[i] for i in clearest], reference.only(clearest)

    def test_split_and_unsplit(self, demo_model: Path, case: tuple[Prompts, Reference], tmp_path: Path) -> None:
        prompts, reference = case
        with Engine(demo_model) as unsplit:
            _expect(reference, unsplit, prompts, "unsplit")
        _expect_split(reference, demo_model, tmp_path, prompts, SHARES)

    def test_mtp_changes_nothing_and_is_accepted(
        self, demo_model: Path, case: tuple[Prompts, Reference], tmp_path: Path
    ) -> None:
        prompts, reference = case
        accepted = _expect_split(reference, demo_model, tmp_path, prompts, SHARES[1:2], engine_args=MTP)
        assert accepted > 100

    def test_bfloat16_within_its_bound(self, demo_model: Path, case: tuple[Prompts, Reference], tmp_path: Path) -> None:
        prompts, reference = case
        sequences = [prompt + ids for prompt, ids in zip(prompts, reference.token_ids, strict=True)]
        exact = score_reference(demo_model, sequences)
        with Engine(demo_model, dtype="bfloat16") as unsplit:
            whole = unsplit.score(sequences)
        with ExpertPlane(demo_model, tmp_path, dtype="bfloat16") as plane:
            plane.publish(plane.start(SHARES[1]))
            with Engine(demo_model, dtype="bfloat16", engine_args=plane.engine_args) as engine:
                split = engine.score(sequences)
                plane.publish(plane.start(SHARES[1], form="int8"))
                int8 = engine.score(sequences)
        assert _mean_difference(split, whole) < 0.03
        # The split is no further from the truth than bfloat16 itself is.
        assert _mean_difference(split, exact) < 1.2 * _mean_difference(whole, exact)
        assert 0 < _mean_difference(int8, exact) < 0.06

    def test_rows_in_fp8_within_their_bound(
        self, demo_model: Path, case: tuple[Prompts, Reference], tmp_path: Path
    ) -> None:
        prompts, reference = case
        sequences = [prompt + ids for prompt, ids in zip(prompts, reference.token_ids, strict=True)]
        rows_in_fp8 = DispatchConfig(dispatch_dtype="float8_e4m3fn")
        with ExpertPlane(demo_model, tmp_path, dispatch=rows_in_fp8) as plane:
            plane.publish(plane.start(SHARES[1]))
            with Engine(demo_model, engine_args=plane.engine_args) as engine:
                split = engine.score(sequences)
        # On other text of this kind 0.008 on average, and 0.0001 of its mean log-probability.
        assert 0 < _mean_difference(split, score_reference(demo_model, sequences)) < 0.02


def _mean_difference(first: list[list[float]], second: list[list[float]]) -> float:
    differences = [
        abs(a - b) for ours, theirs in zip(first, second, strict=True) for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(differences) / len(differences)
