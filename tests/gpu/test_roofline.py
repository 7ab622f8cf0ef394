"""Shares of this card's own rates that the kernels reach at DeepSeek-V3's sizes: what they must not fall below.

`python -m benchmarks.expert_kernels --device cuda` prints all of them; docs/performance.md has what was measured.
"""

from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():
    from benchmarks.gpu_expert_kernels import GpuRow, measure, measure_card
from deployments.experts.forms import Form

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")


@pytest.mark.parametrize("form", [Form.GROUPED_FP8, Form.GROUPED_BFLOAT16])
def test_decode_is_bound_by_memory_and_prefill_by_the_tensor_cores(form: Form) -> None:
    rows: dict[int, GpuRow] = {
        row.rows: row for row in measure(measure_card(), 7168, 2048, 32, 8, [1, 8, 32, 128, 1024], forms=(form,))
    }
    assert rows[1].of_bandwidth > 0.5
    assert min(rows[number].of_bandwidth for number in (8, 32, 128)) > 0.6
    assert rows[1024].of_matrix_rate > 0.33
