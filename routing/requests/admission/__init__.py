"""Admission: which request runs where, which one waits, which one is refused, and why."""

from routing.requests.admission.admission import Admission
from routing.requests.admission.decisions import Admitted, Decision, Demand, Refused

__all__ = ["Admission", "Admitted", "Decision", "Demand", "Refused"]
