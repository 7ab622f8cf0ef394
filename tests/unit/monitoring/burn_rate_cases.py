"""When the burn-rate alerts must fire and when not."""

from __future__ import annotations

from collections.abc import Iterator

from tests.unit.monitoring.alert_case import Case, Firing, ended

HOUR = 60  # minutes
_BURNS = {"ttft": "DeepsplitTtftBudgetBurn", "tpot": "DeepsplitTpotBudgetBurn", "errors": "DeepsplitErrorBudgetBurn"}


def burn_rates() -> Iterator[Case]:
    for slo, name in _BURNS.items():
        scale = 10 if slo == "errors" else 1  # of 10 times as many requests as many may fail
        bad = "0x361 100+100x14"
        good = "0+100x361 36100x14" if scale == 1 else "0+1000x361 361900+900x14"
        good_again = f"{good} {'36200+100x9' if scale == 1 else '375500+1000x9'}", f"{bad} 1500x9"
        yield _burn(
            slo, "six good hours, then bad for 15 minutes", (good, bad), 6 * HOUR + 16,
            (_burning(slo, "1h", "25%" if scale == 1 else "2.5%"),),
        )  # fmt: skip
        yield _burn(slo, "the same, but good again for ten minutes", good_again, 6 * HOUR + 26)
        fraction = "8%" if scale == 1 else "0.8%"
        yield _burn(
            slo, "eight times what is allowed, for seven hours",
            (f"0+{1000 * scale - 80}x420", "0+80x420"), 7 * HOUR,
            (_burning(slo, "6h", fraction), _burning(slo, "3d", fraction)),
        )  # fmt: skip
        yield _burn(
            slo, "twice what is allowed, for eight hours", (f"0+{1000 * scale - 20}x480", "0+20x480"), 8 * HOUR,
            (_burning(slo, "3d", "2%" if scale == 1 else "0.2%"),),
        )  # fmt: skip
        yield _burn(
            slo, "half of what is allowed, for eight hours", (f"0+{1000 * scale - 5}x480", "0+5x480"), 8 * HOUR
        )
        few, some = "0x9 0+1x7 7x20", "0x9 0+1x14 14x20"
        yield Case(name, "each of a night's seven requests fails", _events(slo, "0x40", few), 20)
        yield Case(
            name, "each of fourteen fails", _events(slo, "0x40", some), 25,
            (_burning(slo, "1h", "100%"), _burning(slo, "6h", "100%")),
        )  # fmt: skip
    not_ours = ("bad_request", "cancelled", "quota", "overloaded", "draining")
    yield Case(
        _BURNS["errors"], "what clients do wrong, and what was shed, is no error",
        {ended(outcome): "0+100x90" for outcome in ("ok", *not_ours)}, 80,
    )  # fmt: skip


def _burn(
    slo: str, why: str, events: tuple[str, str], at_min: int, firing: tuple[Firing, ...] = ()
) -> Case:
    return Case(_BURNS[slo], why, _events(slo, *events), at_min, firing, every="2m")


def _burning(slo: str, window: str, fraction: str) -> Firing:
    severity, factor, spent = {"1h": ("page", "14.4", 2), "6h": ("page", "6", 5), "3d": ("ticket", "1", 10)}[window]
    allowed = "0.1" if slo == "errors" else "1"
    return Firing(
        {"severity": severity, "window": window, "model": "m", "class": "interactive", "slo": slo},
        f"True of {fraction} in the last {window}; {allowed} % may be. At {factor} times that, {spent} % of the error "
        f"budget of 30 days goes in {window}.",
    )


def _events(slo: str, good: str, bad: str) -> dict[str, str]:
    if slo == "errors":
        return {ended("ok"): good, ended("engine_error"): bad}
    series = f'deepsplit_slo_requests_total{{model="m",class="interactive",slo="{slo}",met='
    return {f'{series}"true"}}': good, f'{series}"false"}}': bad}
