"""The benchmark of the client's scale counts what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.client_scale import Measured, growth, measure, slope
from benchmarks.client_scale_chart import write_chart
from routing.tokens.request_ids import STEP_REQUEST_IDS
from routing.tokens.wire import HEADER_BYTES, request_bytes


@pytest.fixture(autouse=True)
def _no_step() -> Iterator[None]:
    """Frames carry the ids of the step's requests: those of no step, whatever ran before on this thread."""
    step = STEP_REQUEST_IDS.set("")
    yield
    STEP_REQUEST_IDS.reset(step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_bytes_are_those_of_the_frames(dtype: torch.dtype) -> None:
    one = measure("rows", 1, 16, 5, 64, 4, dtype, budget_s=0.0)
    assert one.bytes_out == request_bytes(5, 64, 4, dtype)
    assert one.bytes_in == HEADER_BYTES + 5 * 64 * 2
    many = measure("rows", 16, 16, 5, 64, 4, dtype, budget_s=0.0)  # a row goes to four workers
    assert many.bytes_in - 5 * 4 * 64 * 2 in range(4 * HEADER_BYTES, 17 * HEADER_BYTES)
    assert many.cpu_us > 0


def point(workers: int, rows: int, cpu_us: float) -> Measured:
    return Measured("workers", workers, 16, rows, 64, "bfloat16", cpu_us, cpu_us, 1, 1)


def test_slope_and_growth() -> None:
    assert slope([point(1, 8, 15.0), point(2, 8, 20.0), point(4, 8, 30.0)]) == pytest.approx(5.0)
    assert growth([point(1, 1, 10.0), point(1, 2, 20.0), point(1, 4, 60.0)]) == pytest.approx(1.5)


def test_the_chart_is_an_image(tmp_path: Path) -> None:
    write_chart(tmp_path / "a" / "chart.svg", "a < b", [("rows", [(1, 20.0), (512, 4000.0)]), ("w", [(1, 9.0)])])
    assert ElementTree.parse(tmp_path / "a" / "chart.svg").getroot().tag.endswith("svg")
