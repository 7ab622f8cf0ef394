"""Every alert fires when it must and is silent when it must be, by promtool; each has a runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import errors
from monitoring.alerts.__main__ import all_groups, prometheus_rule, rules
from monitoring.alerts.rule import Alert
from monitoring.alerts.slos import OURS
from monitoring.links import RUNBOOKS, board_path, runbook
from tests.unit.monitoring.alert_case import Case, Firing
from tests.unit.monitoring.alert_cases import cases

REPOSITORY = Path(__file__).parents[3]
RULES = REPOSITORY / "monitoring" / "rules" / "deepsplit.yaml"
ALERTS = [rule for group in all_groups() for rule in group.rules if isinstance(rule, Alert)]
NAMES = sorted({alert.name for alert in ALERTS})


def promtool(*arguments: str | Path) -> None:
    command = shutil.which("promtool")
    assert command, "promtool is missing: install Debian's package prometheus"
    done = subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_file_is_the_generated_one() -> None:
    assert RULES.read_text(encoding="utf-8") == rules(), "run: make rules"


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", RULES)


def test_the_operators_form_has_the_same_groups() -> None:
    plain, operators = yaml.safe_load(rules()), yaml.safe_load(prometheus_rule("deepsplit"))
    assert (operators["apiVersion"], operators["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert operators["metadata"]["name"] == "deepsplit"
    assert operators["spec"]["groups"] == plain["groups"]


def test_the_base_of_the_runbooks_is_a_parameter() -> None:
    assert "https://wiki/x/DeepsplitShedding.md" in rules("https://wiki/x/")
    assert RUNBOOKS not in rules("https://wiki/x/")


def matching(case: Case, firing: Firing) -> Alert:
    """The rule that makes this alert."""
    (found,) = [
        alert
        for alert in ALERTS
        if alert.name == case.alert and {"severity": alert.severity, **alert.labels}.items() <= firing.labels.items()
    ]
    return found


def rendered(text: str, firing: Firing) -> str:
    return re.sub(r"{{ \$labels\.(\w+) }}", lambda found: firing.labels[found[1]], text)


@pytest.mark.parametrize(("name", "every"), sorted({(case.alert, case.every) for case in cases()}))
def test_fires_and_stays_silent(name: str, every: str, tmp_path: Path) -> None:
    tests = [
        {
            "name": case.why,
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "alert_rule_test": [
                {
                    "alertname": name,
                    "eval_time": f"{case.at_min}m",
                    "exp_alerts": [
                        {
                            "exp_labels": dict(firing.labels),
                            "exp_annotations": {
                                "summary": rendered(matching(case, firing).summary, firing),
                                "description": firing.description,
                                "runbook_url": runbook(RUNBOOKS, name),
                                "dashboard": board_path(matching(case, firing).board),
                            },
                        }
                        for firing in case.firing
                    ],
                }
            ],
        }
        for case in cases()
        if (case.alert, case.every) == (name, every)
    ]
    document = tmp_path / "tests.yaml"
    document.write_text(yaml.safe_dump({
        "rule_files": [str(RULES)],
        "evaluation_interval": every,
        "group_eval_order": [group.name for group in all_groups()],
        "tests": tests,
    }))  # fmt: skip
    promtool("test", "rules", document)


def test_each_rule_is_seen_firing_and_silent() -> None:
    fired = [matching(case, firing) for case in cases() for firing in case.firing]
    quiet = {case.alert: [] for case in cases()}  # type: dict[str, list[list[Alert]]]
    for case in cases():
        quiet[case.alert].append([matching(case, firing) for firing in case.firing])
    assert [alert for alert in ALERTS if alert not in fired] == []
    assert [alert for alert in ALERTS if all(alert in firing for firing in quiet[alert.name])] == []
    assert all(any(not firing for firing in of_name) for of_name in quiet.values())  # and each name wholly silent


@pytest.mark.parametrize("name", NAMES)
def test_has_a_runbook(name: str) -> None:
    page = (REPOSITORY / "docs" / "runbooks" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert sections == ["What it means", "How to confirm", "What to do"]
    for text in re.split(r"^## .*$", page, flags=re.MULTILINE)[1:]:
        assert len(text.split()) > 15, "a section without content"
    assert "```" in page, "no query or command"


def test_no_runbook_without_an_alert() -> None:
    pages = {page.stem for page in (REPOSITORY / "docs" / "runbooks").glob("*.md")}
    assert pages - set(NAMES) == set()


def test_severities_and_texts() -> None:
    for alert in ALERTS:
        assert "{{ $value" in alert.description or alert.labels.get("role") == "all", alert.name
        assert alert.summary.endswith("."), alert.name


def test_refusals_are_not_errors() -> None:
    assert {"overloaded", "quota", "draining", "cancelled", "ok"}.isdisjoint(OURS)


def test_every_5xx_of_the_gateway_is_ours_but_refusals() -> None:
    leaves = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.DeepsplitError)]
    never_seen = (errors.OperatorError, errors.FrameError, errors.StalePlacement, errors.WorkerLost, errors.WorkerLate,
                  errors.WorkerBusy, errors.WorkerFailing, errors.WorkerUnusable, errors.UncoveredExperts,
                  errors.DispatchTimeout)  # fmt: skip
    bases = {errors.ElsewhereError, errors.ClientError, errors.Refusal}
    seen = {one.outcome for one in leaves if one.http_status >= 500 and not issubclass(one, never_seen)
            and one not in bases}  # fmt: skip
    assert seen - {errors.Draining.outcome} == set(OURS)
