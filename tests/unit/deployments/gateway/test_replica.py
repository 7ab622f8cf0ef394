from __future__ import annotations

import subprocess
import sys


def test_gateway_and_attention_deployment_import_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, deployments.gateway.replica, deployments.attention.deployment\n"
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
