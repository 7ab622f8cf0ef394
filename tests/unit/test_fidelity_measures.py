"""The measures of the fidelity card."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fidelity.measures import agreement, kl, same_tokens


def logs(*rows: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float32))


def test_kl_is_that_of_the_definition() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    assert kl(logs(p, p), logs(q, p)).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_tokens_that_were_not_asked_for_count_as_one() -> None:
    p, q = logs([0.5, 0.3, 0.2, 0.0]), logs([0.5, 0.0, 0.2, 0.3])
    assert kl(p, q)[0] == pytest.approx(0.0, abs=1e-6)  # the rest has 0.3 of both
    q = logs([0.7, 0.0, 0.2, 0.1])
    assert kl(p, q)[0] == pytest.approx(0.5 * np.log(0.5 / 0.7) + 0.3 * np.log(0.3 / 0.1), abs=1e-6)


def test_agreement_of_the_most_likely_token_and_the_loss() -> None:
    reference, other = logs([0.6, 0.4], [0.6, 0.4]), logs([0.6, 0.4], [0.3, 0.7])
    found = agreement(reference, other, np.array([0, 0]))
    assert (found.positions, found.top1) == (2, 0.5)
    assert found.loss == pytest.approx(np.log(0.6 / 0.3) / 2, abs=1e-6)


def test_tokens_count_up_to_where_answers_part() -> None:
    assert same_tokens([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)
