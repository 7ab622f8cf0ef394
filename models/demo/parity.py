"""Check that transformers, vLLM, and vLLM with MTP drafts give the same greedy tokens from the checkpoint."""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROMPTS = (
    "def read(self, size=-1):",
    "import os\nimport sys",
    "class Error(Exception):",
    "    for name in names:\n        if",
    '"""This module provides',
)


@dataclass(frozen=True)
class Answer:
    """One engine's greedy tokens for each prompt, and of the drafts that it made how many it accepted."""

    tokens: list[list[int]]
    drafts: int = 0
    accepted: int = 0
    seconds: float = 0.0


def ask_transformers(model: Path, new_tokens: int) -> Answer:
    """Greedy generation in float32 by transformers' own DeepseekV3ForCausalLM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    start = time.monotonic()
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = causal.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        answers.append(made[0, ids.shape[1] :].tolist())
    return Answer(answers, seconds=time.monotonic() - start)


def ask_vllm(model: Path, new_tokens: int, mtp: bool) -> Answer:
    """Greedy generation in float32 by an unsplit vLLM on CPU, one draft token a step where `mtp`."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    drafter = {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}
    engine = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        # vLLM's CPU rotary kernel misreads MLA's queries in eager mode; the torch form of it is right.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        block_size=16,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_model_len=512,
        # Where the processor has AMX, vLLM would take its AMX_MLA, which refuses float32; the drafter too.
        attention_config={"backend": "CPU_MLA"},
        speculative_config=drafter if mtp else None,
        disable_log_stats=False,
    )
    start = time.monotonic()
    outputs = engine.generate(
        list(PROMPTS), SamplingParams(temperature=0.0, max_tokens=new_tokens), use_tqdm=False
    )
    seconds = time.monotonic() - start
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return Answer(
        [list(output.outputs[0].token_ids) for output in outputs],
        drafts=int(counts.get("vllm:spec_decode_num_draft_tokens", 0)),
        accepted=int(counts.get("vllm:spec_decode_num_accepted_tokens", 0)),
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    model, new_tokens = arguments.model.resolve(), arguments.new_tokens
    reference: list[list[int]] = []
    failed = False
    for name, call in (
        ("transformers", (ask_transformers, model, new_tokens)),
        ("vllm", (ask_vllm, model, new_tokens, False)),
        ("vllm with MTP", (ask_vllm, model, new_tokens, True)),
    ):
        # A process for each engine: none inherits another's threads, memory or settings.
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            answer = pool.submit(*call).result()
        reference = reference or answer.tokens
        same = [made == expected for made, expected in zip(answer.tokens, reference, strict=True)]
        failed |= not all(same)
        record = {"engine": name, "same_as_transformers": sum(same), "prompts": len(same)}
        record["tokens"] = sum(map(len, answer.tokens))
        if answer.drafts:
            record |= {"drafts": answer.drafts, "accepted": round(answer.accepted / answer.drafts, 3)}
        print(json.dumps(record), flush=True)
        for index, is_same in enumerate(same):
            if not is_same:
                print(f"  prompt {index}: {reference[index]}\n     {name}: {answer.tokens[index]}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
