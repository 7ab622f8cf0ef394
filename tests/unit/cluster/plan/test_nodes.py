"""The memory that is free on this host, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.plan.nodes import free_memory_bytes


@pytest.mark.parametrize("folder", ["", "memory"])
def test_a_cgroups_limit_counts_without_the_file_pages_that_it_gives_up(tmp_path: Path, folder: str) -> None:
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder else ("memory.max", "memory.current")
    (place / limit).write_text("5000000\n")
    (place / used).write_text("4000000\n")
    (place / "memory.stat").write_text("cache 9\ninactive_file 600000\n")
    assert free_memory_bytes(tmp_path) == 1_600_000


@pytest.mark.parametrize("limit", ["max", None])
def test_without_a_limit_what_the_kernel_has_is_free(tmp_path: Path, limit: str | None) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1")
    assert free_memory_bytes(tmp_path) > 10_000_000
