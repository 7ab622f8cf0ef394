"""The whole matrix, rendered once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helm.chart import Manifest, render
from tests.helm.matrix import MATRIX


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Manifest]]:
    """Objects of each row of the matrix."""
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda row: render(row[1], row[0]), MATRIX.values())
        return dict(zip(MATRIX, made, strict=True))
