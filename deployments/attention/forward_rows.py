"""Which rows of a forward of vLLM are requests' tokens."""

from __future__ import annotations

from deployments.attention.vllm_internals import get_forward_context


def rows_of_requests(rows: int) -> int:
    """Return how many of a forward's rows, from the first on, are requests' tokens: vLLM pads a step to a size that it
    has captured, and its runs for profiling and warm-up have none.
    """
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return 0
    assert isinstance(metadata, dict), "RemoteRoutedExperts refuses two-batch overlap"
    actual: int = getattr(next(iter(metadata.values())), "num_actual_tokens", rows)
    return min(rows, actual)
