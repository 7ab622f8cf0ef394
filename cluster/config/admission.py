"""The section `admission`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config.section import Section


class ClassObjective(Section):
    """What a priority class is promised. A request that would miss it is refused at once."""

    ttft_s: float = Field(gt=0, description="Longest time to first token, in seconds.")
    tpot_s: float = Field(gt=0, description="Longest mean time per further token, in seconds.")


class AdmissionConfig(Section):
    """Load shedding: what is admitted, in which order, and what is refused before it costs anything."""

    mode: Literal["enforce", "shadow", "off"] = Field(
        "enforce", description="`shadow` admits everything within the hard bounds and counts what it would have "
                               "refused; `off` predicts nothing.")
    system: ClassObjective = Field(ClassObjective(ttft_s=10.0, tpot_s=1.0), description="Highest priority.")
    interactive: ClassObjective = Field(ClassObjective(ttft_s=5.0, tpot_s=0.5), description="The default class.")
    batch: ClassObjective = Field(ClassObjective(ttft_s=60.0, tpot_s=2.0), description="Lowest priority.")
    max_waiting: int = Field(512, ge=0, description="Most requests that wait for an attention replica, all "
                                                        "gateways together.")

    def objective(self, priority_label: str) -> ClassObjective:
        """What the class `system`, `interactive` or `batch` is promised. Raises KeyError for another label."""
        return {"system": self.system, "interactive": self.interactive, "batch": self.batch}[priority_label]
