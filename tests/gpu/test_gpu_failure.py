"""After a fault in a kernel the GPU refuses every call of the process: the turn fails, and the worker says why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")

# In a process of its own: its GPU context is lost.
_PROGRAM = """
import torch
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from tests.gpu.layers import LAYER, batch, gpu_experts
compute, turn = ExpertCompute(gpu_experts(Form.GROUPED_FP8).weights, 1), batch(3)
compute.forward(LAYER, *turn)
assert compute.failure is None
torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")]  # an assertion fails on the GPU
try:
    compute.forward(LAYER, *turn)
except RuntimeError as error:
    print("raised", type(error).__name__)
print("failure:", compute.failure)
"""


def test_a_fault_fails_the_turn_and_the_worker() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert "raised" in ran.stdout, ran.stderr
    assert "failure: the GPU refuses every call since a kernel failed" in ran.stdout
