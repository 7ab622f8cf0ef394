"""The placement table: what it holds, its bytes, its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from routing.tokens.placement import NO_TABLE, PlacementFile, PlacementTable, Stamp, WorkerEndpoint


def table(*held: dict[int, tuple[int, ...]], weight_W: list[float] | None = None) -> PlacementTable:
    weights = {f"w{i}": dict.fromkeys((1, 2, 7), np.full(9, weight)) for i, weight in enumerate(weight_W or ())}
    return PlacementTable.of(Stamp(9, 4), [WorkerEndpoint(f"w{i}", f"h:{i}", h) for i, h in enumerate(held)], weights)


def test_holders_are_listed_by_layer_and_expert() -> None:
    made = table({1: (0, 2)}, {1: (0, 1), 2: (1,)}, weight_W=[6.0, 2.0])
    assert made.layers == (1, 2)
    assert made.holders_LER.tolist() == [[[0, 1], [1, -1], [0, -1]], [[-1, -1], [1, -1], [-1, -1]]]
    assert made.weights_LER[0, 0, 0] == pytest.approx(3 * made.weights_LER[0, 0, 1], rel=1e-2)
    assert made.covers([1], 3)
    assert not made.covers([1], 4)
    assert not made.covers([1, 2], 3)
    assert not made.covers([7], 3)


def test_a_table_survives_its_bytes_and_its_file(tmp_path: Path) -> None:
    made, file = table({1: (0, 5), 2: ()}, {1: (3,)}), PlacementFile(tmp_path / "placement")
    assert file.current().stamp == NO_TABLE
    assert not file.current().covers([1], 1)
    file.write(made)
    read = file.current()
    assert read is file.current()
    assert (read.stamp, read.workers, read.layers) == (made.stamp, made.workers, made.layers)
    assert np.array_equal(read.holders_LER, made.holders_LER)
    assert np.array_equal(read.weights_LER, made.weights_LER)


def test_a_table_of_a_whole_cluster_is_compact() -> None:
    held: list[dict[int, tuple[int, ...]]] = [
        {layer: tuple(sorted((worker * 8 + i) % 256 for i in range(8))) for layer in range(3, 61)}
        for worker in range(64)
    ]
    assert len(table(*held).encoded) < 4 * 58 * 256 * 2 + 64 * 40 + 1000


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"deepsplit placement 0\n{}\n", table({1: (0,)}).encoded[:-1], table({1: (0,)}).encoded + b"x"]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="placement table"):
        PlacementTable.decode(data)
