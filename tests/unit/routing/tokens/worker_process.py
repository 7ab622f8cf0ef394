"""A real expert server in a process of its own, with experts that are easy to check by hand.

Expert e multiplies a row by e + 1, so a reference takes one line.
Usage: worker_process HELD DELAY_S HIDDEN MODEL_ID [TLS], where TLS is an InternalTlsConfig in JSON.
"""

from __future__ import annotations

import sys
import time

import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import FrameError, StalePlacement
from routing.tokens.server import ExpertServer


def main() -> None:
    held, delay_s, hidden, model_id = sys.argv[1:5]
    tls = InternalTlsConfig.model_validate_json(sys.argv[5]) if len(sys.argv) > 5 else None
    mine = {int(e) for e in held.split(",")}

    def experts(layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        time.sleep(float(delay_s))
        if layer > 90:
            raise FrameError(f"unknown layer {layer}")
        asked = set(ids_TK[ids_TK >= 0].tolist())
        if not asked <= mine:
            raise StalePlacement(f"not held here: {asked - mine}")
        factor_TK = torch.where(ids_TK >= 0, (ids_TK + 1) * weights_TK, 0.0)
        return hidden_TH.float() * factor_TK.sum(1, keepdim=True)

    server = ExpertServer(experts, int(hidden), model_id, DispatchConfig(keepalive_interval_s=1.0), tls)
    print(server.start("127.0.0.1"), flush=True)
    sys.stdin.read()  # until the parent goes away
    server.stop(0)


if __name__ == "__main__":
    main()
