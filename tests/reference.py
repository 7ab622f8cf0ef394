"""What the tokens must be: greedy decoding by transformers' own model classes, in float32.

Prompts are lists of token ids. Prompts of equal length run as one batch, so nothing is ever padded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from tests.tiny_tokenizer import SPECIAL_TOKENS


@dataclass(frozen=True)
class Reference:
    """Greedy continuations, one entry per prompt, each of `max_tokens` tokens.

    `margins` is by how much the best log-probability of each step is above the second best.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    margins: list[list[float]]

    @property
    def margin(self) -> float:
        """The narrowest choice of all steps. It must be well above rounding, or parity is a matter of luck."""
        return min(min(margins) for margins in self.margins)

    def only(self, prompts: Sequence[int]) -> Reference:
        """The same for some of the prompts, by index, in that order."""
        return Reference(
            [self.token_ids[i] for i in prompts],
            [self.logprobs[i] for i in prompts],
            [self.margins[i] for i in prompts],
        )

    def difference(self, token_ids: Sequence[Sequence[int]]) -> str | None:
        """None if `token_ids` are the same, else where each prompt went astray, and how narrow the choice was there.

        A wide margin says bug; one near float32's rounding (below 1e-4) says that the prompts are badly chosen.
        """
        astray = []
        for i, (ours, theirs) in enumerate(zip(self.token_ids, token_ids, strict=True)):
            if list(theirs) != ours:
                step = next((j for j, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
                where = "in length" if step is None else f"from step {step} on (margin {self.margins[i][step]:.1e})"
                astray.append(f"prompt {i} differs {where}")
        return "; ".join(astray) or None


def make_prompts(
    count: int, vocab_size: int, seed: int = 0, lengths: Sequence[int] = (3, 9, 16, 33)
) -> list[list[int]]:
    """`count` random prompts without special tokens, their lengths (in tokens) taken from `lengths` in turn."""
    source = random.Random(seed)
    first = len(SPECIAL_TOKENS)
    return [[source.randrange(first, vocab_size) for _ in range(lengths[i % len(lengths)])] for i in range(count)]


def greedy_reference(
    checkpoint: Path, prompts: Sequence[Sequence[int]], max_tokens: int, dtype: torch.dtype = torch.float32
) -> Reference:
    """Continue each prompt by exactly `max_tokens` greedy tokens; end-of-text tokens do not stop it."""
    with _one_thread():
        return _greedy(load_model(checkpoint, dtype), prompts, max_tokens)


def score_reference(
    checkpoint: Path, sequences: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[list[float]]:
    """Log-probability of every token but the first of each sequence, given the tokens before it."""
    scores: list[list[float]] = []
    with _one_thread(), torch.inference_mode():
        model = load_model(checkpoint, dtype)
        for sequence in sequences:
            ids = torch.tensor([sequence])
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return scores


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class for the checkpoint, by its name: `AutoModelForCausalLM` takes DeepSeek-V3.2 for V3 in a
    process in which vLLM has read such a configuration. It ignores MTP layers, and says so in its log.
    """
    (name,) = json.loads((checkpoint / "config.json").read_text())["architectures"]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(checkpoint, dtype=dtype)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """These models are too small for more threads, and threads that wait for busy cores cost ten times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> Reference:
    found = Reference([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        inputs = torch.tensor([prompts[i] for i in members])
        cache = DynamicCache(config=model.config)
        for _ in range(max_tokens):
            with torch.inference_mode():
                logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            best = logits[:, -1].float().log_softmax(-1).topk(2)
            inputs = best.indices[:, :1]
            for row, i in enumerate(members):
                first, second = best.values[row].tolist()
                found.token_ids[i].append(int(inputs[row]))
                found.logprobs[i].append(first)
                found.margins[i].append(first - second)
    return found
