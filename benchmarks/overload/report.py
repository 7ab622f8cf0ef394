"""What a load came to: goodput, times to first token, refusals, fairness. For `benchmarks.overload`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.overload.load import Sent
from benchmarks.overload.mix import CLASSES, EQUAL
from cluster.config import AdmissionConfig, ClassObjective

# Reasons of those that were let in to wait first: nobody could know then.
WAITED = ("waited", "displaced")


@dataclass(frozen=True)
class Window:
    """The part of a load that counts, in `time.monotonic` seconds."""

    begin_s: float
    end_s: float

    def tokens(self, sent: Sent) -> int:
        """Tokens that came within it."""
        return sum(self.begin_s <= at_s < self.end_s for at_s in sent.token_s)

    def due(self, sent: Sent) -> bool:
        """Whether the request was due within it."""
        return self.begin_s <= sent.due_s < self.end_s

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.begin_s


@dataclass(frozen=True)
class Figures:
    """One load in numbers; times in seconds."""

    requests: int
    goodput: float  # tokens per second of requests that met both objectives
    throughput: float  # all tokens per second
    ttft_s: Mapping[str, list[float]]  # by class, of requests that were not refused; see `figures`
    refused: Mapping[str, int]  # by class
    asked: Mapping[str, int]  # by class
    reasons: Mapping[str, int]
    refusal_s: list[float]  # until the answer, of all that were refused
    waited_s: list[float]  # of those, the ones that had been let in to wait
    errors: Mapping[str, list[tuple[float, float]]]  # by class: TTFT predicted minus actual, and relative to actual
    late_s: list[float]  # how late the generator was
    tenant_tokens: Mapping[str, int]
    failures: Mapping[str, int]


def met(sent: Sent, objective: ClassObjective) -> bool:
    """Whether the request has met its class's objectives, so far if it was cut off."""
    ttft_s, tpot_s = sent.ttft_s(), sent.tpot_s()
    return ttft_s is not None and ttft_s <= objective.ttft_s and (tpot_s is None or tpot_s <= objective.tpot_s)


def objective_of(admission: AdmissionConfig, priority: str) -> ClassObjective:
    """The class's objective."""
    found = getattr(admission, priority)
    assert isinstance(found, ClassObjective)
    return found


def figures(sent: Sequence[Sent], window: Window, admission: AdmissionConfig) -> Figures:
    """Tokens count when they came, requests when they were due. A request that was cut off without a first token
    counts with the time that it had waited, if that was over its objective already.
    """
    due = [one for one in sent if window.due(one)]
    ttft: dict[str, list[float]] = {name: [] for name in CLASSES}
    for one in due:
        waited_s = window.end_s - one.due_s
        if (ttft_s := one.ttft_s()) is not None:
            ttft[one.arrival.priority].append(ttft_s)
        elif one.ended_s is None and waited_s > objective_of(admission, one.arrival.priority).ttft_s:
            ttft[one.arrival.priority].append(waited_s)
    refused = [one for one in due if one.refusal is not None]
    tenant_tokens: Counter[str] = Counter()
    for one in sent:
        tenant_tokens[one.arrival.tenant] += window.tokens(one)
    good = sum(window.tokens(one) for one in sent if met(one, objective_of(admission, one.arrival.priority)))
    return Figures(
        requests=len(due),
        goodput=good / window.seconds,
        throughput=tenant_tokens.total() / window.seconds,
        ttft_s=ttft,
        refused=Counter(one.arrival.priority for one in refused),
        asked=Counter(one.arrival.priority for one in due),
        reasons=Counter(one.refusal for one in refused if one.refusal is not None),
        refusal_s=[one.ended_s - one.sent_s for one in refused if one.ended_s is not None],
        waited_s=[one.ended_s - one.sent_s for one in refused if one.ended_s is not None and one.refusal in WAITED],
        errors={name: [e for one in due if one.arrival.priority == name for e in _error(one)] for name in CLASSES},
        late_s=[one.sent_s - one.due_s for one in due],
        tenant_tokens=tenant_tokens,
        failures=Counter(one.failure for one in due if one.failure is not None),
    )


def _error(sent: Sent) -> list[tuple[float, float]]:
    """Seconds and fraction by which admission predicted too much. From when it was sent: the generator's own lateness
    is not admission's to predict.
    """
    if sent.predicted_ttft_s is None or not sent.token_s:
        return []
    actual_s = sent.token_s[0] - sent.sent_s
    return [(sent.predicted_ttft_s - actual_s, sent.predicted_ttft_s / actual_s - 1)]


def jain(amounts: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has it all."""
    squares = sum(amount * amount for amount in amounts)
    return sum(amounts) ** 2 / (len(amounts) * squares) if squares else 1.0


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of them do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else float("nan")


@dataclass(frozen=True)
class Run:
    """One load in one mode."""

    figures: Figures
    cpu: Mapping[str, float]  # cores used, by process


def print_load(title: str, enforced: Run, off: Run, most: float, admission: AdmissionConfig) -> None:
    """Both modes side by side. `most`: the highest goodput of any load with shedding."""
    both = (enforced.figures, off.figures)
    print(f"\n{title}\n  {'':52}{'enforce':>42}{'off':>42}")

    def row(name: str, cells: Sequence[str]) -> None:
        print(f"  {name:52}" + "".join(f"{cell:>42}" for cell in cells))

    row("goodput, tokens/s (fraction of the most)", [f"{one.goodput:.0f} ({one.goodput / most:.1%})" for one in both])
    row("all tokens/s", [f"{one.throughput:.0f}" for one in both])
    for name in CLASSES:
        objective_s = objective_of(admission, name).ttft_s
        row(
            f"{name}: TTFT p50 / p99 s (objective {objective_s:g})",
            [f"{quantile(one.ttft_s[name], 0.5):.2f} / {quantile(one.ttft_s[name], 0.99):.2f}" for one in both],
        )
    for name in CLASSES:
        row(f"{name}: refused of asked", [f"{one.refused.get(name, 0)} of {one.asked.get(name, 0)}" for one in both])
    row("refused for", [", ".join(f"{why} {n}" for why, n in one.reasons.items()) or "-" for one in both])
    row("refusal p50 / p99 ms", [_ms(one.refusal_s) for one in both])
    row("  after waiting: number, p50 / p99 ms", [f"{len(one.waited_s)}, {_ms(one.waited_s)}" for one in both])
    row(f"Jain, {' and '.join(EQUAL)}", [f"{_fairness(one):.3f}" for one in both])
    row("generator late p50 / p99 ms", [_ms(one.late_s) for one in both])
    row("failed", [", ".join(f"{n}x {why}" for why, n in one.failures.items()) or "0" for one in both])
    for name in ("interactive", "batch"):
        errors = enforced.figures.errors[name]
        row(f"{name}: TTFT predicted - actual, p1 / p50 / p99", [_spread([s for s, _ in errors], "{:+.2f}", " s"), "-"])
        row("  of actual", [_spread([fraction for _, fraction in errors], "{:+.0%}"), "-"])
    row("cores used", [" ".join(f"{name} {cores:.2f}" for name, cores in one.cpu.items()) for one in (enforced, off)])


def print_verdict(enforced: Sequence[Figures], capacity: float, admission: AdmissionConfig) -> None:
    """The targets, at the last load."""
    last, most = enforced[-1], max(one.goodput for one in enforced)
    p99_s = quantile(last.ttft_s["interactive"], 0.99)
    objective_s = admission.interactive.ttft_s
    refusal_s = quantile(last.refusal_s, 0.99)
    goodput = f"goodput {last.goodput / most:.1%} of its maximum ({most:.0f} tokens/s; capacity {capacity:.0f})"
    lines = [
        (last.goodput >= 0.95 * most, f"{goodput}, at least 95 %"),
        (p99_s <= objective_s, f"p99 TTFT of admitted interactive requests {p99_s:.2f} s, at most {objective_s:g} s"),
        (refusal_s < 0.05, f"p99 of refusals {1e3 * refusal_s:.1f} ms, below 50 ms"),
        (_fairness(last) >= 0.95, f"Jain index of {' and '.join(EQUAL)} {_fairness(last):.3f}, at least 0.95"),
    ]
    print("\nat the highest load, with shedding:")
    for good, text in lines:
        print(f"  {'met' if good else 'MISSED':8}{text}")


def _fairness(one: Figures) -> float:
    return jain([one.tenant_tokens.get(name, 0) for name in EQUAL])


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    if not values:
        return "-"
    return " / ".join(form.format(quantile(values, fraction)) for fraction in (0.01, 0.5, 0.99)) + unit


def _ms(values: Sequence[float]) -> str:
    return f"{1e3 * quantile(values, 0.5):.1f} / {1e3 * quantile(values, 0.99):.1f}" if values else "-"
