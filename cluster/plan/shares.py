"""How many experts each worker gets, and which: the share arithmetic. Pure, exact, deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from cluster.errors import PlanError


def split_shares(num_experts: int, shares: Sequence[float], replicas: int) -> tuple[tuple[int, ...], ...]:
    """Sorted expert ids per worker, for one layer of `num_experts` experts.

    `shares` holds one positive weight per worker; `replicas` is how many workers hold each expert. Every expert is on
    exactly `replicas` distinct workers, and every worker has at least one expert. Counts are those of the largest
    remainder method, except that no worker can have more than all experts: what is over goes to the others.

    Workers take runs of consecutive ids, wrapping at the end (McNaughton's rule: a run is never longer than
    `num_experts`, so no worker meets an expert twice). Consecutive experts form DeepSeek's routing groups, so a token
    whose experts come from few groups is sent to few workers.

    Raises PlanError when it cannot be done: replicas > workers, or more workers than copies of experts.
    """
    assert num_experts >= 1
    assert replicas >= 1
    workers = len(shares)
    if replicas > workers:
        raise PlanError(
            f"experts.replicas_per_expert is {replicas} but there are only {workers} workers to hold the copies: "
            f"set experts.workers to {replicas} or more, or lower experts.replicas_per_expert"
        )
    copies = num_experts * replicas
    if workers > copies:
        raise PlanError(
            f"{workers} expert workers for {copies} copies of experts ({num_experts} experts x {replicas}): some would "
            f"hold nothing; set experts.workers to {copies} or less, or raise experts.replicas_per_expert"
        )
    if any(not 0 < share < float("inf") for share in shares):
        raise PlanError(f"experts.shares must all be finite and above 0, but are {list(shares)}")

    held: list[tuple[int, ...]] = []
    start = 0
    for count in _counts(copies, [Fraction(share) for share in shares], most=num_experts):
        held.append(tuple(sorted((start + i) % num_experts for i in range(count))))
        start += count
    return tuple(held)


def _counts(copies: int, shares: Sequence[Fraction], most: int) -> list[int]:
    """Copies per worker, each within [1, most], summing to `copies`; largest remainder within those bounds."""
    quotas = _bounded_quotas(copies, shares, most)
    counts = [int(quota) for quota in quotas]
    # Quotas of at least 1 and at most `most` keep floors and the extra copy within the bounds.
    by_remainder = sorted(range(len(shares)), key=lambda w: (counts[w] - quotas[w], w))
    for worker in by_remainder[: copies - sum(counts)]:
        counts[worker] += 1
    return counts


def _bounded_quotas(copies: int, shares: Sequence[Fraction], most: int) -> list[Fraction]:
    """Exact copies per worker in proportion to `shares`, except where a bound holds one at 1 or at `most`.

    Water filling: quota = clamp(level x share, 1, most) with the one level at which the quotas sum to `copies`. That
    level lies between two of the points where a worker meets a bound; the sum is linear in between.
    """

    def at(level: Fraction) -> list[Fraction]:
        return [min(max(level * share, Fraction(1)), Fraction(most)) for share in shares]

    bends = sorted({bound / share for share in shares for bound in (Fraction(1), Fraction(most))})
    low = bends[0]
    for high in bends:
        if sum(at(high)) >= copies:
            break
        low = high
    below, above = sum(at(low)), sum(at(high))
    if above == below:
        return at(high)
    return at(low + (high - low) * (copies - below) / (above - below))
