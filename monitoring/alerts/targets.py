"""Alerts on processes that cannot be seen, and on certificates."""

from __future__ import annotations

from monitoring.alerts.rule import Alert, Group, Severity

ROLES = ("gateway", "attention", "engine", "experts")  # always there; the directory has an alert of its own
_ANY = 'count by (model) (up{job="deepsplit"})'


def groups() -> list[Group]:
    """Return the alerts, in one group."""
    return [
        Group("deepsplit-target-alerts", "30s", [
            Alert(
                "DeepsplitTargetDown", 'count by (model, role) (up{job="deepsplit"} == 0) > 0', "5m", "ticket",
                "{{ $labels.model }}: scrape targets of the role {{ $labels.role }} do not answer.",
                "{{ $value }} targets could not be scraped for 5 minutes: their processes hang, or the network between "
                "Prometheus and them is cut.",
                "overview",
            ),
            *(_missing(role) for role in ROLES),
            Alert(
                "DeepsplitRoleWithoutTarget", 'absent(up{job="deepsplit"})', "5m", "page",
                "Prometheus sees no process of deepsplit at all.",
                "The job deepsplit has no targets: no gateway answers service discovery, or Prometheus "
                "is not set up for it.",
                "overview", {"role": "all"},
            ),
            Alert(
                "DeepsplitDirectoryDown", _without("directory"), "5m", "page",
                "{{ $labels.model }}: there is no directory.",
                "None of {{ $value }} targets is a live directory. Serving goes on with the last placement table, "
                "but an expert worker that is lost or started from now on is not noticed.",
                "dispatcher", {"role": "directory"},
            ),
            _certificate(14, "ticket"),
            _certificate(2, "page"),
        ]),
    ]  # fmt: skip


def _without(role: str) -> str:
    return f'{_ANY} unless on (model) count by (model) (up{{job="deepsplit",role="{role}"}} == 1)'


def _missing(role: str) -> Alert:
    return Alert(
        "DeepsplitRoleWithoutTarget", _without(role), "5m", "page",
        f"{{{{ $labels.model }}}}: no process of the role {role} can be seen.",
        "None of {{ $value }} targets is a live one of this role.",
        "overview", {"role": role},
    )  # fmt: skip


def _certificate(days: int, severity: Severity) -> Alert:
    left = "min by (model, role, certificate) (deepsplit_certificate_expiry_timestamp_seconds) - time()"
    return Alert(
        "DeepsplitCertificateExpires", f"{left} < {days * 86400}", "10m", severity,
        "{{ $labels.model }}: the certificate {{ $labels.certificate }} of the role {{ $labels.role }} ends soon.",
        "It ends in {{ $value | humanizeDuration }}; from then on connections fail.",
        "gateway",
    )  # fmt: skip
