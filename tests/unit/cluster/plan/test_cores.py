"""Cores of made-up hosts: who gets which, and who gets none."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import PinCores
from cluster.errors import PlanError
from cluster.plan.cores import (
    ComputeProcess,
    Core,
    CoreShare,
    HostCores,
    assign,
    pick,
    ranges,
    regular_host,
)


def processes(*threads: int | None, pin: PinCores = "auto") -> list[ComputeProcess]:
    return [ComputeProcess(f"p{i}", count, pin) for i, count in enumerate(threads)]


def cores_of(shares: tuple[CoreShare, ...]) -> list[str]:
    return [ranges(share.cores) for share in shares]


def assert_as_before(shares: tuple[CoreShare, ...], host: HostCores) -> None:
    for share in shares:
        assert (share.cores, share.pinned, share.spin) == (host.all, False, False)


def test_a_two_core_machine_stays_as_it_was() -> None:
    host = regular_host(2)
    shares = assign(host, processes(2, 1, 1))
    assert_as_before(shares, host)
    assert [share.threads for share in shares] == [2, 1, 1]
    assert str(shares[0]) == "cores 0-1 of NUMA node 0, 2 threads, not pinned, waiting threads sleep"


def test_a_core_for_each_thread_and_one_more() -> None:
    assert cores_of(assign(regular_host(5), processes(2, 1, 1))) == ["1-2", "3", "4"]
    assert_as_before(assign(regular_host(4), processes(2, 1, 1)), regular_host(4))


def test_each_physical_core_has_one_owner_before_waiting_threads_spin() -> None:
    spacious = assign(regular_host(5), processes(2, 2))
    assert [share.spin for share in spacious] == [True, True]
    siblings = assign(regular_host(4, siblings=2), processes(2, 2))
    assert all(share.pinned and not share.spin for share in siblings)


def test_waiting_threads_sleep_where_others_may_come() -> None:
    shares = assign(regular_host(8), processes(2), may_spin=False)
    assert str(shares[0]) == "cores 1-2 of NUMA node 0, 2 threads, pinned, waiting threads sleep"


def test_physical_cores_come_before_siblings() -> None:
    host = regular_host(4, siblings=2)  # 0 and 4 are one physical core, and so on
    assert cores_of(assign(host, processes(3))) == ["1-3"]
    # The first core's sibling and those of its own: nobody else's.
    assert cores_of(assign(host, processes(5))) == ["1-5"]


def test_eight_workers_on_128_cores_of_two_sockets() -> None:
    host = regular_host(128, siblings=1, numa_nodes=2)
    shares = assign(host, processes(*[15] * 8))
    assert all(share.pinned and len(share.numa_nodes) == 1 for share in shares)
    assert [sum(share.numa_nodes == (node,) for share in shares) for node in (0, 1)] == [4, 4]


def test_a_whole_numa_node_goes_to_the_process_that_fills_it() -> None:
    host = regular_host(16, numa_nodes=2)
    small, large = assign(host, processes(4, 8))
    assert (ranges(large.cores), ranges(small.cores)) == ("8-15", "1-4")


def test_a_process_larger_than_a_node_has_whole_nodes_first() -> None:
    (share,) = assign(regular_host(16, numa_nodes=4), processes(6))
    assert (ranges(share.cores), share.numa_nodes) == ("4-9", (1, 2))


def test_offline_and_forbidden_cores_are_nobodys() -> None:
    host = HostCores(tuple(Core(number, number, number // 4) for number in (1, 3, 4, 6, 7)))
    assert cores_of(assign(host, processes(3, 1))) == ["4,6-7", "3"]


def test_cores_under_a_quota_are_not_divided() -> None:
    host = HostCores(regular_host(8).cores, quota=4.0)
    assert_as_before(assign(host, processes(2, 1)), host)
    assert cores_of(assign(HostCores(host.cores, quota=8.0), processes(2, 1))) == ["1-2", "3"]


@pytest.mark.parametrize(("quota", "threads"), [(None, 8), (4.0, 4), (2.5, 2), (0.5, 1), (64.0, 8)])
def test_threads_that_are_not_set_stay_within_the_quota(quota: float | None, threads: int) -> None:
    (share,) = assign(HostCores(regular_host(8).cores, quota), processes(None))
    assert share.threads == threads


def test_a_process_with_threads_for_all_cores_leaves_nobody_pinned() -> None:
    host = regular_host(8)
    shares = assign(host, processes(None, 1))
    assert_as_before(shares, host)
    assert [share.threads for share in shares] == [8, 1]


def test_beside_one_that_is_never_pinned_only_those_that_always_are() -> None:
    host = regular_host(8)
    never, auto = ComputeProcess("never", 1, "never"), ComputeProcess("auto", 1, "auto")
    assert_as_before(assign(host, [never, auto]), host)
    always = assign(host, [never, ComputeProcess("always", 2, "always")])[1]
    assert (always.cores, always.pinned, always.spin) == ((1, 2), True, False)


@pytest.mark.parametrize("host", [regular_host(2), HostCores(regular_host(8).cores, quota=3.0)])
def test_always_without_cores_is_refused_with_the_fix(host: HostCores) -> None:
    with pytest.raises(PlanError, match=r"p0: pin_cores is always, but 2 core.*lower threads, or set pin_cores: auto"):
        assign(host, processes(2, pin="always"))


def test_none_of_too_few() -> None:
    assert pick(regular_host(4), [1, 2], 3) is None


def test_ranges() -> None:
    assert [ranges(numbers) for numbers in ([5], [3, 1, 2], [0, 2, 3, 7])] == ["5", "1-3", "0,2-3,7"]


@st.composite
def hosts(draw: st.DrawFn) -> HostCores:
    whole = regular_host(draw(st.integers(1, 24)), draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)))
    kept = draw(st.sets(st.sampled_from(whole.cores), min_size=1))
    quota = draw(st.none() | st.floats(0.5, 64))
    return HostCores(tuple(core for core in whole.cores if core in kept), quota)


@given(hosts(), st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=6))
def test_what_holds_on_every_host(host: HostCores, threads: list[int | None]) -> None:
    wanted = processes(*threads)
    shares = assign(host, wanted)
    assert [share.name for share in shares] == [process.name for process in wanted]
    assert len({share.pinned for share in shares}) == 1  # all or none
    for share, count in zip(shares, threads, strict=True):
        assert set(share.cores) <= set(host.all)
        assert share.threads == (count or host.worth)
        assert share.threads == len(share.cores) or not share.pinned
        assert share.pinned or not share.spin
    pinned = [share for share in shares if share.pinned]
    assert all(not set(a.cores) & set(b.cores) for a, b in combinations(pinned, 2))
    assert not pinned or len({core for share in pinned for core in share.cores}) < len(host.cores)  # one is left
    physical = {core.number: core.physical for core in host.cores}
    spinning = [physical[core] for share in shares if share.spin for core in share.cores]
    assert len(spinning) == len(set(spinning))
    assert not spinning or physical[host.all[0]] not in spinning
