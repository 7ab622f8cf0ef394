"""An engine, whole or split over several sets of workers, held against transformers: float32, greedy, 20 prompts of 64
tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.engines import Engine
from tests.expert_processes import ExpertPlane
from tests.reference import Reference, greedy_reference

PROMPTS, TOKENS = 20, 64
# Shares of 1, 2 and 3 workers. Consecutive experts go to one worker, so these are also different cuts through groups.
SHARES: Sequence[Sequence[float]] = ([1], [3, 1], [1, 2, 4])
MTP: Mapping[str, Any] = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
# Two float32 programs of this size differ by about 3e-5 in log-probability; a margin below that would be luck.
MIN_MARGIN, MAX_LOGPROB_DIFFERENCE = 1e-4, 2e-4

# As attention.compile sets it.
NO_AOT: Mapping[str, str] = {"VLLM_USE_AOT_COMPILE": "0"}

Checkpoint = Callable[..., Path]
Prompts = list[list[int]]


def reference_of(checkpoint: Path, prompts: Prompts) -> Reference:
    """What must come, if no step of it is a matter of rounding."""
    reference = greedy_reference(checkpoint, prompts, TOKENS)
    assert reference.margin > MIN_MARGIN, f"choose other prompts: two tokens are within {reference.margin:.1e}"
    return reference


def expect(reference: Reference, engine: Engine, prompts: Prompts, what: str) -> None:
    """An engine gives these tokens, with these log-probabilities."""
    run = engine.generate(prompts, TOKENS)
    assert reference.difference(run.token_ids) is None, f"{what}: {reference.difference(run.token_ids)}"
    furthest = max(
        abs(a - b)
        for ours, theirs in zip(reference.logprobs, run.logprobs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert furthest < MAX_LOGPROB_DIFFERENCE, f"{what}: log-probabilities differ by up to {furthest:.1e}"


def expect_split(
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
                expect(reference, engine, prompts, f"split over {len(of_set)} workers")
            return engine.generate(prompts[:1], 1).accepted


def mean_difference(first: list[list[float]], second: list[list[float]]) -> float:
    """Of two engines' scores of the same sequences."""
    differences = [
        abs(a - b) for ours, theirs in zip(first, second, strict=True) for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(differences) / len(differences)
