"""Which form a host gets, and what it says where that is slow or impossible."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from cluster.errors import StartupError
from deployments.experts import forms
from deployments.experts.forms import Form, choose_form
from tests.unit.deployments.experts.layers import spec_of

FP8 = (128, 128)
GPUS = {"packed": (9, 0), "ampere": (8, 0), "vector": (0, 0), "none": (0, 0)}  # compute capability beside the CPU


@pytest.fixture
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's library offers: `packed` (AVX-512 with bfloat16), `vector` (AVX2), or nothing."""
    kind = getattr(request, "param", "packed")
    monkeypatch.setattr(forms, "has_packed_kernel", lambda: kind == "packed")
    monkeypatch.setattr(forms, "has_vector_kernel", lambda: kind != "none")
    monkeypatch.setattr(forms, "load_operators", lambda: "" if kind == "none" else "_C_AVX2")
    monkeypatch.setattr(forms, "gpu_can", lambda major, minor: (major, minor) <= GPUS[kind])


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("wanted", "model_dtype", "stored", "device", "form"),
    [
        ("auto", "auto", None, "cpu", Form.PACKED_BFLOAT16),
        ("auto", "auto", FP8, "cpu", Form.PACKED_FP8),
        ("auto", "float32", FP8, "cpu", Form.PACKED_FP8),  # as stored
        ("auto", "float32", None, "cpu", Form.FLOAT32),
        ("float32", "bfloat16", FP8, "cpu", Form.FLOAT32),
        ("bfloat16", "float32", FP8, "cpu", Form.PACKED_BFLOAT16),
        ("float16", "auto", None, "cpu", Form.FLOAT16),
        ("int8", "auto", None, "cpu", Form.PACKED_INT8),
        ("int8", "auto", FP8, "cpu", Form.PACKED_INT8),
        ("auto", "auto", None, "cuda", Form.GROUPED_BFLOAT16),
        ("auto", "auto", FP8, "cuda", Form.GROUPED_FP8),
        ("bfloat16", "auto", FP8, "cuda", Form.GROUPED_BFLOAT16),
        ("float32", "auto", None, "cuda", Form.FLOAT32),
    ],
)
def test_a_host_with_the_packed_kernel(
    wanted: str, model_dtype: str, stored: tuple[int, int] | None, device: str, form: Form,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert choose_form(wanted, model_dtype, spec_of(fp8_block=stored), device) is form
    assert not caplog.records


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("host", "form", "said"),
    [("vector", Form.VECTOR_BFLOAT16, "_C_AVX2"), ("none", Form.BFLOAT16, "no library of vLLM's")],
    indirect=["host"],
)
def test_a_slower_host_is_told_why(form: Form, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_form("auto", "auto", spec_of(fp8_block=FP8), "cpu") is form
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "FP8 experts become bfloat16, at twice their size", "the experts' GEMMs will be slow",
    ]  # fmt: skip
    assert said in caplog.text
    with pytest.raises(StartupError, match=r"experts\.dtype: int8 needs vLLM's CPU library .*: set bfloat16"):
        choose_form("int8", "auto", spec_of(), "cpu")


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("host", "possible"),
    [
        ("packed", [Form.PACKED_BFLOAT16, Form.VECTOR_BFLOAT16, Form.BFLOAT16]),
        ("vector", [Form.VECTOR_BFLOAT16, Form.BFLOAT16]),
        ("none", [Form.BFLOAT16]),
    ],
    indirect=["host"],
)
def test_bfloat16_is_held_as_is_fastest_here(possible: list[Form]) -> None:
    asked: list[list[Form]] = []

    def last(forms: Sequence[Form]) -> Form:
        asked.append(list(forms))
        return forms[-1]

    assert choose_form("auto", "auto", spec_of(), "cpu", last) is Form.BFLOAT16
    assert choose_form("auto", "float32", spec_of(), "cpu", last) is Form.FLOAT32
    assert asked == [possible]  # float32 is nobody's choice


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("host", ["ampere"], indirect=True)
def test_a_gpu_without_fp8_is_said_to_have_none(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_form("auto", "auto", spec_of(fp8_block=FP8), "cuda") is Form.GROUPED_BFLOAT16
    assert "FP8 needs a GPU of compute capability 8.9" in caplog.text


@pytest.mark.usefixtures("host")
def test_sizes_that_the_gpus_kernels_cannot_do(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_form("auto", "auto", spec_of(inner=96), "cuda") is Form.BFLOAT16
    assert "sizes that are multiples of 64 (hidden 256, intermediate 96)" in caplog.text
    assert choose_form("auto", "auto", spec_of(inner=64, fp8_block=FP8), "cuda") is Form.GROUPED_BFLOAT16
    assert choose_form("auto", "auto", spec_of(fp8_block=(64, 64)), "cuda") is Form.GROUPED_BFLOAT16


@pytest.mark.usefixtures("host")
def test_sizes_that_the_kernels_cannot_do(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_form("auto", "auto", spec_of(inner=80), "cpu") is Form.BFLOAT16
    assert "multiples of 32 (hidden 256, intermediate 80)" in caplog.text
    assert choose_form("auto", "auto", spec_of(inner=96, fp8_block=FP8), "cpu") is Form.PACKED_BFLOAT16
    assert choose_form("auto", "auto", spec_of(fp8_block=(64, 64)), "cpu") is Form.PACKED_BFLOAT16
