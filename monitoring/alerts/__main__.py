"""Writes the rules: `python -m monitoring.alerts > monitoring/rules/deepsplit.yaml`; --help for the other form."""

from __future__ import annotations

import argparse

import yaml

from monitoring.alerts import attention, experts, slos, targets
from monitoring.alerts.rule import Group
from monitoring.links import RUNBOOKS

_HEAD = "# Generated from monitoring/alerts by `make rules`; do not edit.\n"


def all_groups() -> list[Group]:
    """Return every group of rules."""
    return [*slos.groups(), *experts.groups(), *attention.groups(), *targets.groups()]


def rules(runbooks: str = RUNBOOKS) -> str:
    """Return a rule file for Prometheus; `runbooks` is the base of the pages' URLs."""
    return _HEAD + _yaml({"groups": [group.document(runbooks) for group in all_groups()]})


def prometheus_rule(name: str, runbooks: str = RUNBOOKS) -> str:
    """Return the same rules as a PrometheusRule for the Prometheus operator."""
    return _HEAD + _yaml({
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name},
        "spec": {"groups": [group.document(runbooks) for group in all_groups()]},
    })  # fmt: skip


def _yaml(document: dict[str, object]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)


def main() -> None:
    """Print the rules."""
    parser = argparse.ArgumentParser(prog="python -m monitoring.alerts", description="Prints the alerting rules.")
    parser.add_argument("--prometheus-rule", metavar="NAME", help="as a PrometheusRule of this name")
    parser.add_argument("--runbooks", metavar="URL", default=RUNBOOKS, help="where docs/runbooks is served")
    arguments = parser.parse_args()
    if arguments.prometheus_rule:
        print(prometheus_rule(arguments.prometheus_rule, arguments.runbooks), end="")
    else:
        print(rules(arguments.runbooks), end="")


if __name__ == "__main__":
    main()
