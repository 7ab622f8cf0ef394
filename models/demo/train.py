"""Train the demo model on the Python standard library; export it as a Hugging Face DeepSeek-V3 checkpoint."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import ASSISTANT, USER, Windows, encode_stream, read_corpus, train_tokenizer
from model import DemoModel, demo_config, export
from torch import nn
from transformers import PreTrainedTokenizerFast

MTP_WEIGHT = 0.3
"""Lambda of the MTP loss (DeepSeek-V3 report, section 4.2: 0.3 for most of the training)."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="wall-clock budget that the schedule follows"
    )
    parser.add_argument(
        "--steps", type=int, help="step budget instead: the schedule then follows steps (repeatable)"
    )
    parser.add_argument(
        "--out", type=Path, default=here, help="folder of the exported checkpoint and train.log"
    )
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder of the state that a later run resumes"
    )
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="trained positions in a window")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--peak-lr", type=float, default=1.5e-3)
    parser.add_argument("--bias-speed", type=float, default=4e-3, help="gamma of the balancing bias update")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--threads", type=int, default=1, help="more rarely pays at this size")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="minutes between exports")
    parser.add_argument(
        "--experts", default="demo_sorted", help="experts implementation (also eager, grouped_mm)"
    )
    return parser.parse_args()


def learning_rate(progress: float, peak: float, warmup: float = 0.05, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine to `floor * peak`, over `progress` in [0, 1]."""
    if progress < warmup:
        return peak * max(progress, 1e-4) / warmup
    phase = min(1.0, (progress - warmup) / (1.0 - warmup))
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * phase)))


class LoadBalancer:
    """Auxiliary-loss-free balancing (DeepSeek-V3 report, section 2.1.2) by each MoE layer's bias."""

    def __init__(self, model: DemoModel) -> None:
        self._gates = {index: moe.gate for index, moe in model.moe_layers()}
        self._load_E: dict[int, torch.Tensor] = {}
        for index, gate in self._gates.items():
            gate.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Callable[[nn.Module, tuple, tuple], None]:
        def count(gate: nn.Module, _inputs: tuple, outputs: tuple) -> None:
            self._load_E[index] = torch.bincount(outputs[2].flatten(), minlength=gate.num_experts).float()

        return count

    def update(self, speed: float) -> dict[int, tuple[float, float]]:
        """bias += speed * sign(mean load - load); returns each layer's (least, greatest) load / mean."""
        spread: dict[int, tuple[float, float]] = {}
        for index, load_E in self._load_E.items():
            mean = load_E.mean()
            self._gates[index].e_score_correction_bias += speed * torch.sign(mean - load_E)
            spread[index] = (round(float(load_E.min() / mean), 3), round(float(load_E.max() / mean), 3))
        return spread


class MasterAdamW:
    """AdamW over float32 master copies of a bfloat16 model (report, sections 3.3.2 and 4.2).

    Betas 0.9 and 0.95; weight decay 0.1 on matrices only; gradients clipped to norm 1.
    """

    def __init__(self, model: DemoModel) -> None:
        named = list(model.named_parameters())
        self._weights = [weight for _, weight in named]
        self.masters = [weight.detach().float().clone() for weight in self._weights]
        model.to(torch.bfloat16)
        for _, moe in model.moe_layers():
            moe.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.float()
        decays = [weight.ndim >= 2 and "embed" not in name for name, weight in named]
        groups = [
            {
                "params": [m for m, d in zip(self.masters, decays, strict=True) if d is decay],
                "weight_decay": rate,
            }
            for decay, rate in ((True, 0.1), (False, 0.0))
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Apply and clear the model's gradients; returns their norm before clipping."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for weight, master in zip(self._weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters, 1.0))
        self.adamw.step()
        torch._foreach_copy_(self._weights, self.masters)
        return norm


def prepare_text(arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Windows]:
    """Train and save the tokenizer, encode the training files, cut them into windows."""
    corpus = read_corpus()
    tokenizer = train_tokenizer((text for _, text in corpus.train), arguments.vocab)
    tokenizer.save_pretrained(arguments.out)
    stream = encode_stream(tokenizer, corpus.train)
    print(
        f"{len(corpus.train)} files, {sum(len(t) for _, t in corpus.train)} characters, {len(stream)} tokens",
        flush=True,
    )
    marks = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    return tokenizer, Windows(stream, arguments.length, arguments.seed, *marks, tokenizer.bos_token_id)


def train_step(model: DemoModel, window: torch.Tensor) -> tuple[float, float]:
    """Accumulate gradients of main loss + MTP_WEIGHT * MTP loss over int64[B, T + 2]; returns both losses."""
    main_logits, mtp_logits = model(window[:, :-1])
    main_loss = F.cross_entropy(main_logits.flatten(0, 1).float(), window[:, 1:-1].flatten())
    mtp_loss = F.cross_entropy(mtp_logits.flatten(0, 1).float(), window[:, 2:].flatten())
    (main_loss + MTP_WEIGHT * mtp_loss).backward()
    return main_loss.item(), mtp_loss.item()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    _, windows = prepare_text(arguments)
    model = DemoModel(demo_config(arguments.vocab))
    model.main.set_experts_implementation(arguments.experts)
    model.main.set_attn_implementation("eager")  # faster than sdpa on CPU when v and qk widths differ
    balancer = LoadBalancer(model)
    optimizer = MasterAdamW(model)
    state_path, log_path = arguments.scratch / "state.pt", arguments.out / "train.log"
    step, elapsed_before_s = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.adamw.load_state_dict(state["adamw"])
        torch._foreach_copy_(optimizer.masters, state["masters"])
        step, elapsed_before_s = state["step"], state["elapsed_s"]
        lines = log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        log_path.write_text(
            "".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8"
        )
        print(f"resumed at step {step}", flush=True)
    else:
        log_path.unlink(missing_ok=True)

    start = saved = time.monotonic()
    tokens_per_step = arguments.batch * arguments.length
    logged_step, logged = step, start
    progress = 0.0
    while progress < 1.0:
        elapsed_s = elapsed_before_s + time.monotonic() - start
        progress = min(
            1.0, (step + 1) / arguments.steps if arguments.steps else elapsed_s / (60.0 * arguments.minutes)
        )
        lr = learning_rate(progress, arguments.peak_lr)
        main_loss, mtp_loss = train_step(model, windows.batch(step, arguments.batch))
        norm = optimizer.step(lr)
        # The bias settles over the last tenth, as the report stops its update before the end (section 4.2).
        spread = balancer.update(arguments.bias_speed * min(1.0, 10.0 * (1.0 - progress)))
        step += 1

        now = time.monotonic()
        if step % 20 == 0 or step <= 5 or progress >= 1.0:
            rate = (step - logged_step) * tokens_per_step / (now - logged)
            logged_step, logged = step, now
            record = {
                "step": step,
                "elapsed_s": round(elapsed_before_s + now - start, 1),
                "tokens": step * tokens_per_step,
                "main_loss": round(main_loss, 4),
                "mtp_loss": round(mtp_loss, 4),
                "lr": round(lr, 7),
                "grad_norm": round(norm, 3),
                "tokens_per_s": round(rate),
                "load_over_mean": spread,
            }
            line = json.dumps(record)
            print(line, flush=True)
            with log_path.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        first_export = saved == start and now - start > 60.0
        if first_export or now - saved > 60.0 * arguments.save_minutes or progress >= 1.0:
            saved = now
            export(model, arguments.out)
            state = {"model": model.state_dict(), "masters": optimizer.masters, "step": step}
            state |= {"adamw": optimizer.adamw.state_dict(), "elapsed_s": elapsed_before_s + now - start}
            partial = state_path.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_path)


if __name__ == "__main__":
    main()
