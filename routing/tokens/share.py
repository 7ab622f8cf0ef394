"""A share of the experts, and arithmetic on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Share = Mapping[int, Sequence[int]]  # layer -> expert ids


def without(share: Share, other: Share) -> Share:
    """Return what is in `share` and not in `other`; no layer without experts."""
    left = {layer: tuple(e for e in ids if e not in set(other.get(layer, ()))) for layer, ids in share.items()}
    return {layer: ids for layer, ids in left.items() if ids}


def first_bytes(share: Share, most: int, nbytes_of: Callable[[Share], int]) -> Share:
    """Return the first experts of `share` that have at most `most` bytes together, by `nbytes_of`; one at least."""
    first: dict[int, tuple[int, ...]] = {}
    left = most
    for layer, ids in share.items():
        for expert in ids:
            left -= nbytes_of({layer: (expert,)})
            if left < 0 and first:
                return first
            first[layer] = (*first.get(layer, ()), expert)
    return first
