"""A prompt's attention in linear memory, held against vLLM's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.attention.cpu.mla_prefill import LinearMemoryPrefill
from deployments.attention.vllm_internals import CPUSDPAMLAPrefillBackend

QUERIES, KEYS = torch.tensor([0, 5, 5 + 17]), torch.tensor([0, 9, 9 + 40])


def backend(of: Any) -> Any:
    made = object.__new__(of)  # its scale is all that it needs here
    made.scale = 0.2
    return made


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 4, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_new_tokens_equal_vllms() -> None:
    q, k, v = rows(22, 48, 1), rows(22, 48, 2), rows(22, 32, 3)
    ours, our_lse = backend(LinearMemoryPrefill)._ragged_sdpa(q, k, v, QUERIES, QUERIES, True, True)
    theirs, their_lse = backend(CPUSDPAMLAPrefillBackend)._ragged_sdpa(q, k, v, QUERIES, QUERIES, True, True)
    assert ours.shape == (22, 4, 32)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_lse, their_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_before_equal_vllms(dtype: torch.dtype) -> None:
    q, k, v = rows(22, 48, 1, dtype), rows(49, 48, 2, dtype), rows(49, 32, 3, dtype)
    ours, our_lse = backend(LinearMemoryPrefill)._ragged_sdpa(q, k, v, QUERIES, KEYS, False, True)
    theirs, their_lse = backend(CPUSDPAMLAPrefillBackend)._ragged_sdpa(q, k, v, QUERIES, KEYS, False, True)
    assert (ours.dtype, our_lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(ours, theirs, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
    torch.testing.assert_close(our_lse, their_lse, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)


def test_a_request_without_tokens_of_before_adds_nothing() -> None:
    keys = torch.tensor([0, 9, 9])
    out, lse = backend(LinearMemoryPrefill)._ragged_sdpa(
        rows(22, 48, 1), rows(9, 48, 2), rows(9, 32, 3), QUERIES, keys, False, True
    )
    assert not out[5:].any()
    assert (lse[:, 5:] == -torch.inf).all()
    assert lse[:, :5].isfinite().all()
