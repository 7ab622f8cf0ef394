"""What is fastest on this host, measured when a worker starts: the form of 16-bit weights, and when slices pay.

Calls of the candidates take turns and the least time of each counts, so a busy host disturbs them alike; with one
thread what others take of its core does not count at all. A candidate must be clearly faster to displace the one that
is preferred, and win a second measurement; slices are given up only after a second one too. It takes about half a
second with experts of DeepSeek-V3's size, and nothing with small ones. The choice changes how a result is rounded, not
what it is; float32 is never calibrated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from cluster.model.spec import ModelSpec
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from deployments.experts.many_rows import slices_of
from deployments.experts.weights import ExpertWeights, empty_layer
from routing.tokens.share import Share

_MARGIN = 0.9  # of the preferred candidate's time, to be taken in its place
_FORM_ROWS = (1, 16)  # of one expert: decoding, with few and with many requests
_SLICED_ROWS = (96, 48, 24)  # of one expert
_LEAST_EXPERT_BYTES = 1 << 20  # a smaller one takes as long in any form
_OUT_OF_CACHE_BYTES = 64 << 20
_TURNS, _LEAST_S = 3, 0.05  # of each candidate in a measurement: so many, and for so long in all


def fastest_form(forms: Sequence[Form], spec: ModelSpec, threads: int) -> Form:
    """Return the fastest of `forms`, the preferred one first, with made-up experts of the model's sizes."""
    expert_bytes = 6 * spec.hidden_size * spec.moe_intermediate_size
    if len(forms) == 1 or expert_bytes < _LEAST_EXPERT_BYTES:
        return forms[0]
    held = min(spec.num_experts, math.ceil(_OUT_OF_CACHE_BYTES / expert_bytes))
    layers = [empty_layer(spec, tuple(range(held)), form) for form in forms]
    for layer in layers:
        layer.gate_up.fill_(0.01)
        layer.down.fill_(0.01)
    asked = min(spec.top_k, held)
    computes = [ExpertCompute(ExpertWeights({0: layer}, spec.num_experts, 0), threads) for layer in layers]

    def measure() -> list[tuple[float, ...]]:
        by_rows = [_least_s(computes, 0, range(held), spec.hidden_size, rows, asked) for rows in _FORM_ROWS]
        return list(zip(*by_rows, strict=True))

    return confirmed(forms, measure)


def confirmed(forms: Sequence[Form], measure: Callable[[], Sequence[Sequence[float]]]) -> Form:
    """Return the quickest form by `measure()`, the seconds of each form; asked again where it is not the first one."""
    seconds = measure()
    if quickest(dict(zip(forms, seconds, strict=True))) is forms[0]:
        return forms[0]
    least = [tuple(map(min, *both)) for both in zip(seconds, measure(), strict=True)]
    return quickest(dict(zip(forms, least, strict=True)))


def quickest(seconds: Mapping[Form, Sequence[float]]) -> Form:
    """Return the form with the least geometric mean of its times; the first one unless another is clearly faster."""
    means = {form: math.prod(times) ** (1 / len(times)) for form, times in seconds.items()}
    first, best = next(iter(means)), min(means, key=means.__getitem__)
    return best if means[best] < _MARGIN * means[first] else first


def many_rows_from(weights: ExpertWeights, held: Share, threads: int) -> int | None:
    """Return from how many rows an expert is faster in slices on this host; None: never, or its form has no slices.
    `held`: the experts that have been loaded.
    """
    number, ids = next(((layer, ids) for layer, ids in held.items() if ids), (0, ()))
    if not ids or weights.layers[number].form is not Form.PACKED_BFLOAT16:
        return None
    hidden_size = weights.layers[number].hidden_size
    if slices_of(hidden_size) == 1:
        return None
    computes = [ExpertCompute(weights, threads), ExpertCompute(weights, threads, many_rows=1)]
    return least_rows(lambda rows: _least_s(computes, number, ids, hidden_size, rows))


def choice_text(form: Form, many_rows: int | None) -> str:
    """Return what was chosen, for logs and `deepsplit status`."""
    return form.value if many_rows is None else f"{form.value}; in slices from {many_rows} rows per expert"


def least_rows(measure: Callable[[int], Sequence[float]]) -> int | None:
    """Return the least of the tried row counts from which on slices are always clearly faster.

    `measure(rows)` returns the seconds of the fused kernel and of slices; it is asked twice where they do not gain.
    """
    least = None
    for rows in _SLICED_ROWS:
        fused_s, sliced_s = measure(rows)
        if sliced_s >= _MARGIN * fused_s:
            fused_s, sliced_s = map(min, measure(rows), (fused_s, sliced_s))
        if sliced_s >= _MARGIN * fused_s:
            break
        least = rows
    return least


def _least_s(
    computes: Sequence[ExpertCompute], number: int, ids: Sequence[int], hidden_size: int, rows: int, asked: int = 1
) -> tuple[float, ...]:
    """Return the least time of each for `rows` rows that ask for the same experts, `asked` of `ids`, others each turn.
    """
    hidden_TH, weights_TK = torch.full((rows, hidden_size), 0.01, dtype=torch.bfloat16), torch.ones(rows, asked)
    least, clock = [math.inf] * len(computes), time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    turn, ends_s = 0, time.monotonic() + _LEAST_S * len(computes)
    while turn < _TURNS or time.monotonic() < ends_s:
        ids_K = [ids[(turn * asked + at) % len(ids)] for at in range(asked)]
        ids_TK = torch.tensor([ids_K] * rows, dtype=torch.int16)
        for at, compute in enumerate(computes):
            began_s = clock()
            compute.forward(number, hidden_TH, ids_TK, weights_TK)
            least[at] = min(least[at], clock() - began_s)
        turn += 1
    return tuple(least)
