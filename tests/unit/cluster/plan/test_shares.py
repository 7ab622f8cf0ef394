import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import PlanError
from cluster.plan.shares import split_shares


def test_equal_shares_of_divisible_experts() -> None:
    assert split_shares(8, [1, 1], 1) == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_sixty_experts_over_seven_workers() -> None:
    assert [len(held) for held in split_shares(60, [1] * 7, 1)] == [9, 9, 9, 9, 8, 8, 8]


def test_uneven_shares() -> None:
    assert split_shares(8, [3, 1], 1) == ((0, 1, 2, 3, 4, 5), (6, 7))


def test_largest_remainder_gets_the_odd_expert() -> None:
    # Quotas 1.4, 1.4, 7.2: floors 1, 1, 7; the first of the largest remainders (0.4) gets the tenth.
    assert [len(held) for held in split_shares(10, [1.4, 1.4, 7.2], 1)] == [2, 1, 7]


def test_copies_are_on_distinct_workers() -> None:
    assert split_shares(4, [1, 1, 1], 2) == ((0, 1, 2), (0, 1, 3), (2, 3))


def test_share_over_all_experts_spills_to_the_others_in_proportion() -> None:
    # 16 slots of 8 experts: the first worker can hold only 8, the other 8 go 3 to 1.
    assert [len(held) for held in split_shares(8, [100, 3, 1], 2)] == [8, 6, 2]


def test_tiny_share_still_gets_an_expert() -> None:
    assert [len(held) for held in split_shares(16, [1e6, 1], 1)] == [15, 1]


def test_replicas_over_workers() -> None:
    with pytest.raises(PlanError, match=r"replicas_per_expert is 3 but there are only 2 workers"):
        split_shares(8, [1, 1], 3)


def test_more_workers_than_copies() -> None:
    with pytest.raises(PlanError, match=r"5 expert workers for 4 copies.*set experts.workers to 4"):
        split_shares(4, [1] * 5, 1)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_share_not_above_zero(bad: float) -> None:
    with pytest.raises(PlanError, match="must all be finite and above 0"):
        split_shares(8, [1, bad], 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_expert_on_exactly_replicas_distinct_workers(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 70))
    shares = data.draw(st.lists(st.floats(0.01, 100), min_size=1, max_size=min(12, num_experts)))
    replicas = data.draw(st.integers(1, len(shares)))
    placed = split_shares(num_experts, shares, replicas)

    assert len(placed) == len(shares)
    assert all(held == tuple(sorted(set(held))) and held for held in placed)
    copies = [sum(expert in held for held in placed) for expert in range(num_experts)]
    assert copies == [replicas] * num_experts
    assert placed == split_shares(num_experts, shares, replicas)
    # Where no bound is met, counts are within one of the exact quota.
    quotas = [num_experts * replicas * share / sum(shares) for share in shares]
    if all(1 <= quota <= num_experts for quota in quotas):
        assert all(abs(len(held) - quota) < 1 + 1e-6 for held, quota in zip(placed, quotas, strict=True))
