"""Records which experts the demo model's router chooses, window by window of text of one kind after the other.

    python -m benchmarks.balance.record benchmarks/balance/demo_trace.npz

Each window is 4,096 tokens of one package of the Python standard library (what the demo model was trained on), read by
transformers' own DeepSeek-V3 classes. The counts are those that the attention side makes of the same choices
(`monitoring.expert_load`). `loads_NLE` in the file: tokens per expert, int32[windows, MoE layers, experts].
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("asyncio", "email", "json", "unittest", "xml", "logging", "tkinter", "multiprocessing")
_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
_TOKENS, _LENGTH = 4096, 512


def main() -> None:
    """Write the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    begun = time.monotonic()
    loads_NLE = record()
    np.savez_compressed(args.file, loads_NLE=loads_NLE, packages=np.array(PACKAGES))
    print(f"{args.file}: {loads_NLE.shape}, {loads_NLE.sum()} choices, {time.monotonic() - begun:.0f} s")


@torch.inference_mode()
def record() -> np.ndarray:
    """Return tokens per window, layer and expert, int32[N, L, E]."""
    model = AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    experts = model.config.n_routed_experts
    layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    counts_LE = np.zeros((len(layers), experts), dtype=np.int32)

    def count_in(row: int) -> None:
        def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counts_LE[row] += np.bincount(args[1].flatten().numpy(), minlength=experts).astype(np.int32)

        layers[row].register_forward_pre_hook(count)

    for row in range(len(layers)):
        count_in(row)
    windows = []
    for package in PACKAGES:
        folder = Path(sysconfig.get_path("stdlib")) / package
        text = "\n".join(path.read_text() for path in sorted(folder.rglob("*.py")))
        ids = tokenizer(text, return_tensors="pt").input_ids[0, :_TOKENS].reshape(-1, _LENGTH)
        counts_LE[:] = 0
        for row_T in ids:
            model(row_T[None])
        windows.append(counts_LE.copy())
    return np.stack(windows)


if __name__ == "__main__":
    main()
