"""When alerts must fire and when not; the burn rates' are in burn_rate_cases.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.unit.monitoring.alert_case import Case, Firing, ended
from tests.unit.monitoring.burn_rate_cases import burn_rates


def cases() -> list[Case]:
    """All."""
    return [*burn_rates(), *_experts(), *_attention(), *_targets()]


# --- the expert plane ---


def _experts() -> Iterator[Case]:
    model = {"model": "m"}
    uncovered = Firing(
        {"severity": "page", **model},
        "4 experts, over all layers, are held by no live worker; requests that need them wait, fail or are degraded, "
        "as dispatch.on_uncovered says.",
    )
    series = 'deepsplit_uncovered_experts{model="m"}'
    yield Case("DeepsplitExpertsUncovered", "four, to the end", {series: "0x4 4x10"}, 8, (uncovered,))
    yield Case("DeepsplitExpertsUncovered", "a worker that came back within a minute", {series: "0x4 4 0x10"}, 8)

    wanted, ready = _members("experts")
    yield Case(
        "DeepsplitExpertWorkerDown", "one of three is gone", {wanted: "3x20", ready: "3x4 2x16"}, 12,
        (_down("experts", 1),),
    )  # fmt: skip
    yield Case(
        "DeepsplitExpertWorkerDown", "none was ever there", {wanted: "3x20"}, 12, (_down("experts", 3),)
    )
    yield Case("DeepsplitExpertWorkerDown", "back within five minutes", {wanted: "3x20", ready: "3x4 2x3 3x20"}, 12)

    lost = 'deepsplit_expert_worker_events_total{model="m",event="lost"}'
    ready_again = 'deepsplit_expert_worker_events_total{model="m",event="ready"}'
    yield Case(
        "DeepsplitExpertWorkerFlapping", "six losses in half an hour", {lost: "0x9 1x4 2x4 3x4 4x4 5x4 6x4"}, 38,
        (Firing({"severity": "ticket", **model}, "6 times in 30 minutes an expert worker fell silent."),),
    )  # fmt: skip
    yield Case(
        "DeepsplitExpertWorkerFlapping", "two losses, many starts", {lost: "0x9 1x9 2x20", ready_again: "0+1x40"}, 38
    )

    aside = 'deepsplit_dispatch_workers_set_aside{model="m",worker="%s",reason="worker_unusable"}'
    yield Case(
        "DeepsplitExpertWorkerSetAside", "two of them, by one of two engines", {aside % "a": "0x9", aside % "b": "2x9"},
        5,
        (Firing(
            {"severity": "ticket", "reason": "worker_unusable", **model},
            "2 expert workers are set aside (worker_unusable); others have to do without them.",
        ),),
    )  # fmt: skip
    yield Case("DeepsplitExpertWorkerSetAside", "replaced within two minutes", {aside % "a": "0x3 1 1 0x9"}, 6)

    for others in (1, 3):
        yield Case(
            "DeepsplitExpertStraggler", f"three times as slow as the other {others}",
            _replies({"slow": 3, **{f"w{i}": 1 for i in range(others)}}), 30,
            (Firing(
                {"severity": "ticket", "expert_worker": "slow", **model},
                "It takes 3 times as long for a reply as the other workers do in the mean; every layer waits for "
                "the slowest.",
            ),),
        )  # fmt: skip
    yield Case(
        "DeepsplitExpertStraggler", "slower, but not by that much; one is idle", _replies({"a": 3, "b": 2, "c": 0}), 30
    )

    def layers(*ratios: float) -> dict[str, str]:
        return {f'deepsplit_layer_imbalance_ratio{{model="m",layer="{i}"}}': f"{r}x60" for i, r in enumerate(ratios)}

    yield Case(
        "DeepsplitExpertImbalance", "in most layers", layers(6, 6, 6, 2), 45,
        (Firing(
            {"severity": "ticket", **model},
            "In the mean over layers the fullest expert has 5 times the tokens of the average one.",
        ),),
    )  # fmt: skip
    yield Case("DeepsplitExpertImbalance", "in one layer", layers(8, 2, 2, 2), 45)


def _members(member: str) -> tuple[str, str]:
    return (
        f'deepsplit_members_wanted{{model="m",member="{member}"}}',
        f'deepsplit_members{{model="m",member="{member}",state="ready"}}',
    )


def _down(member: str, count: int) -> Firing:
    what, key = {
        "experts": ("expert workers", "experts.workers"),
        "attention": ("attention replicas", "attention.replicas"),
    }[member]
    return Firing(
        {"severity": "ticket", "model": "m"}, f"{count} of the {what} that {key} asks for are not ready."
    )


def _replies(milliseconds: Mapping[str, float]) -> dict[str, str]:
    """A thousand replies a minute of each worker that works."""
    series: dict[str, str] = {}
    for worker, ms in milliseconds.items():
        labels = f'{{model="m",expert_worker="{worker}"}}'
        series[f"deepsplit_dispatch_worker_seconds_total{labels}"] = f"0+{ms}x40"
        series[f"deepsplit_dispatch_worker_replies_total{labels}"] = f"0+{1000 if ms else 0}x40"
    return series


# --- attention and admission ---


def _attention() -> Iterator[Case]:
    wanted, ready = _members("attention")
    yield Case(
        "DeepsplitAttentionReplicaDown", "one of two is gone", {wanted: "2x20", ready: "2x4 1x16"}, 12,
        (_down("attention", 1),),
    )  # fmt: skip
    yield Case("DeepsplitAttentionReplicaDown", "back within five minutes", {wanted: "2x20", ready: "2x4 1x3 2x20"}, 12)

    def caches(first: float, second: float) -> dict[str, str]:
        series = 'deepsplit_kv_cache_usage_ratio{model="m",worker='
        return {f'{series}"a"}}': f"{first}x30", f'{series}"b"}}': f"{second}x30"}

    yield Case(
        "DeepsplitKvCacheExhausted", "both", caches(1, 0.96), 15,
        (Firing(
            {"severity": "ticket", "model": "m"},
            "98% of the KV caches' blocks are in use, in the mean over replicas; vLLM preempts sequences, or admission "
            "refuses requests.",
        ),),
    )  # fmt: skip
    yield Case("DeepsplitKvCacheExhausted", "one is full, the other has room", caches(1, 0.5), 15)

    def shed(plane: str, refused: int, minutes: int) -> dict[str, str]:
        refusals = f'deepsplit_refusals_total{{model="m",plane="{plane}",reason="r",class="batch"}}'
        return {
            ended("ok"): f"0+{100 - refused}x{minutes}",
            ended("overloaded"): f"0+{refused}x{minutes}",
            refusals: f"0+{refused}x{minutes}",
        }

    def shedding(severity: str, fraction: str) -> Firing:
        return Firing(
            {"severity": severity, "model": "m", "plane": "experts"},
            f"{fraction} of the requests were refused because of this plane.",
        )

    yield Case("DeepsplitShedding", "half, for a short time", shed("experts", 50, 10), 8, (shedding("page", "50%"),))
    yield Case("DeepsplitShedding", "a tenth, for long", shed("experts", 10, 30), 25, (shedding("ticket", "10%"),))
    yield Case("DeepsplitShedding", "three of a hundred, for long", shed("experts", 3, 30), 25)
    yield Case("DeepsplitShedding", "a tenant over its own quota", shed("quota", 50, 30), 25)

    def predictions(too_short: int, too_long: int) -> dict[str, str]:
        series = 'deepsplit_ttft_prediction_error_seconds_{0}{{model="m",class="batch"{1}}}'
        return {
            series.format("bucket", ',le="-2.0"'): f"0+{too_short}x90",
            series.format("bucket", ',le="2.0"'): f"0+{100 - too_long}x90",
            series.format("count", ""): "0+100x90",
        }

    yield Case(
        "DeepsplitPredictionOff", "too short or too long in a quarter of the cases", predictions(10, 15), 80,
        (Firing(
            {"severity": "ticket", "model": "m", "class": "batch"},
            "25% of the predictions were more than 2 s off; what is refused and what is promised rests on them.",
        ),),
    )  # fmt: skip
    yield Case("DeepsplitPredictionOff", "off in a tenth of the cases", predictions(5, 5), 80)


# --- targets and certificates ---

_ROLES = ("gateway", "attention", "engine", "experts", "directory")


def _targets() -> Iterator[Case]:
    everybody = {_up(role): "1x20" for role in _ROLES}
    yield Case(
        "DeepsplitTargetDown", "two of three expert workers",
        {_up("experts", i): "1x4 0x16" if i else "1x20" for i in range(3)}, 12,
        (Firing(
            {"severity": "ticket", "model": "m", "role": "experts"},
            "2 targets could not be scraped for 5 minutes: their processes hang, or the network between Prometheus and "
            "them is cut.",
        ),),
    )  # fmt: skip
    yield Case("DeepsplitTargetDown", "one, for two minutes", everybody | {_up("experts"): "1x4 0x1 1x20"}, 12)
    for role in _ROLES:
        alert = "DeepsplitDirectoryDown" if role == "directory" else "DeepsplitRoleWithoutTarget"
        labels = {"severity": "page", "model": "m", "role": role}
        what = (
            "None of {0} targets is a live directory. Serving goes on with the last placement table, but an expert "
            "worker that is lost or started from now on is not noticed."
            if role == "directory"
            else "None of {0} targets is a live one of this role."
        )
        gone = {series: values for series, values in everybody.items() if series != _up(role)}
        yield Case(alert, f"no {role}", gone, 12, (Firing(labels, what.format(4)),))
        yield Case(alert, f"no live {role}", gone | {_up(role): "1x4 0x16"}, 12, (Firing(labels, what.format(5)),))
        yield Case(alert, f"a {role} that restarts", everybody | {_up(role): "1x4 0x3 1x20"}, 12)
    yield Case(
        "DeepsplitRoleWithoutTarget", "nobody at all", {'up{job="other"}': "1x20"}, 12,
        (Firing(
            {"severity": "page", "role": "all", "job": "deepsplit"},
            "The job deepsplit has no targets: no gateway answers service discovery, or Prometheus is not set up for "
            "it.",
        ),),
    )  # fmt: skip

    def certificate(days_left: float) -> dict[str, str]:
        series = 'deepsplit_certificate_expiry_timestamp_seconds{model="m",role="gateway",certificate="gateway.tls"}'
        return {series: f"{int(days_left * 86400) + 20 * 60}x30"}

    labels = {"model": "m", "role": "gateway", "certificate": "gateway.tls"}
    ends = "It ends in {0}; from then on connections fail."
    yield Case(
        "DeepsplitCertificateExpires", "in ten days", certificate(10), 20,
        (Firing({"severity": "ticket", **labels}, ends.format("10d 0h 0m 0s")),),
    )  # fmt: skip
    yield Case(
        "DeepsplitCertificateExpires", "in a day", certificate(1), 20,
        (
            Firing({"severity": "ticket", **labels}, ends.format("1d 0h 0m 0s")),
            Firing({"severity": "page", **labels}, ends.format("1d 0h 0m 0s")),
        ),
    )  # fmt: skip
    yield Case("DeepsplitCertificateExpires", "in a month", certificate(30), 20)


def _up(role: str, index: int = 0) -> str:
    return f'up{{job="deepsplit",model="m",role="{role}",instance="host:{index}"}}'
