"""Block hashes that mean a prefix, and an index that forgets as the caches do."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from routing.requests.prefix_index import BLOCK_BYTES, PrefixIndex, prefix_hashes


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_as_many_hashes_are_equal_as_blocks_are_shared(shared: bytes, one: bytes, other: bytes) -> None:
    first, second = shared + one, shared + other
    stretched = [b"".join(bytes([byte]) * (BLOCK_BYTES // 4) for byte in each) for each in (first, second)]
    left, right = map(prefix_hashes, stretched)
    same = 0
    while same < min(len(left), len(right)) and first[: 4 * same + 4] == second[: 4 * same + 4]:
        same += 1
    assert left[:same] == right[:same]
    assert not set(left[same:]) & set(right[same:])


def test_only_full_blocks_count_and_only_so_many() -> None:
    assert prefix_hashes(b"x" * 255) == ()
    assert len(prefix_hashes(b"x" * 256)) == 1
    assert len(prefix_hashes(b"x" * 511)) == 1
    assert len(prefix_hashes(b"x" * 300_000)) == 256


def test_hashes_are_the_same_in_another_process() -> None:
    code = "from routing.requests.prefix_index import prefix_hashes; print(prefix_hashes(b'split ' * 200))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(prefix_hashes(b"split " * 200))


def test_replicas_are_told_apart_and_forgotten() -> None:
    index = PrefixIndex()
    index.add("a", (1, 2, 3), capacity=10)
    assert index.longest("a", (1, 2, 4)) == 2
    assert index.longest("b", (1, 2, 4)) == 0
    index.forget("a")
    index.forget("never seen")
    assert index.longest("a", (1, 2, 4)) == 0


def test_leaves_are_forgotten_before_roots_and_old_before_new() -> None:
    index = PrefixIndex()
    index.add("a", (1, 2, 3), capacity=4)
    index.add("a", (1, 5), capacity=4)  # shares its root with the older one
    index.add("a", (7,), capacity=4)
    assert index.longest("a", (1, 2, 3)) == 2
    assert index.longest("a", (1, 5)) == 2
    assert index.longest("a", (7,)) == 1


def test_a_chain_longer_than_the_bound_keeps_its_beginning() -> None:
    index = PrefixIndex()
    index.add("a", tuple(range(10)), capacity=4)
    assert index.longest("a", tuple(range(10))) == 4
    assert len(index._blocks["a"]) == 4


# Paths of one tree: a node's name is its path, as a chained hash is.
_PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=30)


@given(_PATHS, st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 12))
def test_bisection_finds_what_a_walk_finds(paths: list[list[int]], asked: list[int], capacity: int) -> None:
    def chain(path: list[int]) -> tuple[int, ...]:
        return tuple(int("1" + "".join(map(str, path[: n + 1]))) for n in range(len(path)))

    index = PrefixIndex()
    for path in paths:
        index.add("a", chain(path), capacity)
    walked = 0
    for block in chain(asked):
        if not index.longest("a", (block,)):
            break
        walked += 1
    assert index.longest("a", chain(asked)) == walked
    assert len(index._blocks.get("a", ())) <= capacity
