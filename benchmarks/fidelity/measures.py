"""How far two models' predictions are from each other. Pure.

Legend: P positions in texts, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """What one variant predicts, against what it should."""

    positions: int
    kl_mean: float  # nats
    kl_p99: float
    top1: float  # part of the positions at which both find the same token most likely
    loss: float  # mean negative log-probability of the text's own tokens, over that of the reference


def kl(reference_PV: np.ndarray, other_PV: np.ndarray) -> np.ndarray:
    """Return the Kullback-Leibler divergence of each position, [P] nats, from log-probabilities [P, V].

    Tokens for which one of the two has -inf (they were not asked for) count as one token together: the result is then
    not larger than the true divergence.
    """
    both_PV = np.isfinite(reference_PV) & np.isfinite(other_PV)
    p_PV, q_PV = (np.where(both_PV, np.exp(one.astype(np.float64)), 0.0) for one in (reference_PV, other_PV))
    terms_PV = np.where(both_PV, p_PV * (np.where(both_PV, reference_PV, 0.0) - np.where(both_PV, other_PV, 0.0)), 0.0)
    rest_p, rest_q = (np.clip(1 - one.sum(axis=1), 1e-12, None) for one in (p_PV, q_PV))
    rest_P = np.where(both_PV.all(axis=1), 0.0, rest_p * np.log(rest_p / rest_q))
    return np.maximum(terms_PV.sum(axis=1) + rest_P, 0.0)


def agreement(reference_PV: np.ndarray, other_PV: np.ndarray, tokens_P: np.ndarray) -> Agreement:
    """Compare predictions of the same positions. `tokens_P`: the tokens that the text has there."""
    kl_P, at_P = kl(reference_PV, other_PV), np.arange(len(tokens_P))
    loss = float((reference_PV[at_P, tokens_P] - other_PV[at_P, tokens_P]).mean())
    same_P = reference_PV.argmax(axis=1) == other_PV.argmax(axis=1)
    return Agreement(len(kl_P), float(kl_P.mean()), float(np.quantile(kl_P, 0.99)), float(same_P.mean()), loss)


def same_tokens(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """Return which part of the generated tokens is equal, up to where two answers to a prompt part."""
    equal = total = 0
    for ours, theirs in zip(first, second, strict=True):
        parts = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        equal, total = equal + parts, total + len(ours)
    return equal / total
