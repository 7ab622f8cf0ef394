"""What every section of a configuration is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Dtype = Literal["float32", "bfloat16", "float16"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float16"]
PinCores = Literal["auto", "always", "never"]
FieldPath = tuple[str | int, ...]


class Section(BaseModel):
    """A part of a file that operators write. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, optional or not; None if it holds a value."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def conflict(field: str | FieldPath, message: str) -> PydanticCustomError:
    """Error about `field` (or the path to it) of the section that is being validated, because of another key."""
    return PydanticCustomError("conflict", "{message}", {"field": field, "message": message})


def conflicts(section: Section, found: Sequence[tuple[FieldPath, str]]) -> ValidationError:
    """Several errors as `conflict` makes them, about fields of `section`, for messages that list all of them."""
    details = [InitErrorDetails(type=conflict(path, message), input=section) for path, message in found]
    return ValidationError.from_exception_data(type(section).__name__, details)


class NodeSelector(Section):
    """Where processes of one role may run, in Ray's terms."""

    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each process asks for, such as {expert_host: 1}.")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that a node must have, such as {role: experts}.")
    num_cpus: float | None = Field(None, ge=0, description="Ray CPUs that each process asks for.")
    num_gpus: float | None = Field(None, ge=0, description="Ray GPUs that each process asks for.")
