"""Measure the exported checkpoint on the held-out files and print the model card's tables as Markdown."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import encode_stream, read_corpus
from model import DemoModel, load_checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

WINDOW_T = 256
# No white space at the end: the tokenizer joins it to what follows.
SAMPLE_PROMPTS = (
    "def read(self, size=-1):",
    "import os\nimport sys\n\n\nclass",
    "    for name in names:\n        if",
)


@dataclass
class Measures:
    """Sums over the held-out windows."""

    tokens: int = 0
    main_nll: float = 0.0
    mtp_tokens: int = 0
    mtp_nll: float = 0.0
    drafts: int = 0
    accepted: int = 0
    correct: int = 0
    windows: int = 0


def count_loads(model: DemoModel) -> dict[int, torch.Tensor]:
    """Hook every MoE layer, the MTP module's too; the returned map sums each one's tokens per expert."""
    loads: dict[int, torch.Tensor] = {}

    def counter(index: int, experts: int) -> None:
        loads[index] = torch.zeros(experts)

        def hook(_gate: torch.nn.Module, _inputs: tuple, outputs: tuple) -> None:
            loads[index] += torch.bincount(outputs[2].flatten(), minlength=experts)

        layers[index].gate.register_forward_hook(hook)

    layers = dict(model.moe_layers())
    for index, moe in layers.items():
        counter(index, moe.gate.num_experts)
    return loads


@torch.no_grad()
def measure(model: DemoModel, stream: torch.Tensor, bos_id: int, max_windows: int) -> Measures:
    """Windows of the begin token and 256 tokens of the held-out stream, one after the other, each on its own.

    A draft at position t is the MTP module's greedy token given the true tokens up to t + 1; it is accepted
    when it equals the main model's greedy token after the same tokens: what a greedy verifier would compare.
    """
    sums = Measures()
    starts = range(0, len(stream) - WINDOW_T, WINDOW_T)[:max_windows]
    for first in range(0, len(starts), 8):
        texts = [stream[start : start + WINDOW_T] for start in starts[first : first + 8]]
        ids = torch.stack([torch.cat([torch.tensor([bos_id]), text]) for text in texts])  # [B, 257]
        main_logits, mtp_logits = model(ids)  # [B, 256, V]: position t predicts ids[t + 1], and ids[t + 2]
        sums.windows += len(texts)
        sums.tokens += ids[:, 1:].numel()
        sums.main_nll += float(
            F.cross_entropy(main_logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        )
        sums.mtp_tokens += ids[:, 2:].numel()
        drafted = mtp_logits[:, :-1]
        sums.mtp_nll += float(F.cross_entropy(drafted.flatten(0, 1), ids[:, 2:].flatten(), reduction="sum"))
        greedy = main_logits.argmax(-1)
        sums.drafts += greedy[:, 1:].numel()
        sums.accepted += int((drafted.argmax(-1) == greedy[:, 1:]).sum())
        sums.correct += int((greedy == ids[:, 1:]).sum())
    return sums


def loss_curve(log_path: Path, rows: int = 12) -> list[str]:
    """Mean losses over equal spans of the training log, as Markdown."""
    records = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    lines = ["| tokens (M) | minutes | main loss | MTP loss | tokens/s |", "|---|---|---|---|---|"]
    for row in range(rows):
        part = records[row * len(records) // rows : (row + 1) * len(records) // rows]
        if not part:
            continue
        means = {
            key: sum(r[key] for r in part) / len(part) for key in ("main_loss", "mtp_loss", "tokens_per_s")
        }
        last = part[-1]
        lines.append(
            f"| {last['tokens'] / 1e6:.2f} | {last['elapsed_s'] / 60:.1f} | {means['main_loss']:.3f} "
            f"| {means['mtp_loss']:.3f} | {means['tokens_per_s']:.0f} |"
        )
    return lines


def load_table(loads: dict[int, torch.Tensor], mtp_index: int) -> list[str]:
    """Least and greatest tokens per expert over the layer's mean, as Markdown."""
    lines = ["| MoE layer | least / mean | greatest / mean |", "|---|---|---|"]
    for index, load_E in loads.items():
        relative = load_E / load_E.mean()
        name = f"{index} (MTP)" if index == mtp_index else str(index)
        lines.append(f"| {name} | {relative.min():.2f} | {relative.max():.2f} |")
    return lines


def samples(
    model: DemoModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], temperature: float
) -> list[str]:
    """Completions of 64 tokens, the prompt included, as Markdown code blocks; greedy at temperature 0."""
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    lines: list[str] = []
    for prompt in prompts:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.main.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, **drawn)
        text = tokenizer.decode(made[0], skip_special_tokens=True)
        lines += [f"Prompt `{json.dumps(prompt)}`:", "", "```python", text.rstrip("\n"), "```", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--model", type=Path, default=here, help="folder of the exported checkpoint")
    parser.add_argument(
        "--windows", type=int, default=10_000, help="at most so many held-out windows of 256 tokens"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", action="append", help="only complete this beginning (may be repeated)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the completions; 0 is greedy")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()  # transformers reports the MTP module's tensors as unexpected

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_checkpoint(arguments.model)
    if arguments.prompt:
        print("\n".join(samples(model, tokenizer, arguments.prompt, arguments.temperature)))
        return
    held_out = read_corpus().held_out
    stream = encode_stream(tokenizer, held_out)
    loads = count_loads(model)
    sums = measure(model, stream, tokenizer.bos_token_id, arguments.windows)
    table = load_table(loads, model.config.num_hidden_layers)
    main_loss, mtp_loss = sums.main_nll / sums.tokens, sums.mtp_nll / sums.mtp_tokens
    characters = sum(len(text) for _, text in held_out) / len(stream)
    print(
        f"Held-out: {len(held_out)} files, {sums.tokens} tokens measured of {len(stream)}, "
        f"{characters:.2f} characters per token\n"
    )
    print("| held-out measure | value |\n|---|---|")
    print(f"| main loss (nats per token) | {main_loss:.3f} |")
    print(f"| main perplexity | {math.exp(main_loss):.2f} |")
    print(f"| main bits per character | {main_loss / math.log(2) / characters:.3f} |")
    print(f"| main greedy token correct | {sums.correct / sums.tokens:.3f} |")
    print(f"| MTP loss (nats per token, second next) | {mtp_loss:.3f} |")
    print(f"| MTP draft equals main greedy | {sums.accepted / sums.drafts:.3f} |\n")
    print("\n".join(table) + "\n")
    if (arguments.model / "train.log").exists():
        print("\n".join(loss_curve(arguments.model / "train.log")) + "\n")
    print("\n".join(samples(model, tokenizer, SAMPLE_PROMPTS, arguments.temperature)))


if __name__ == "__main__":
    main()
